"""What a config executes, opens and contacts; and that of a log only what its reader has agreed to.

A config is code: its user has chosen it. A log is data, which may come from elsewhere and may have been edited. To
show, report, export and verify it, nothing that it names is executed, opened or contacted but its models. To go on with
it, or to score it again, all of it is: so a log that this user has not begun on this machine (`run.log.storage.is_own`)
needs `--trust` for that.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmevo.config import Config
from llmevo.errors import RunError
from llmevo.llm.client import VARIABLE, is_own_server, without_password
from llmevo.llm.templates import foreign
from llmevo.run.experiment import config_of
from llmevo.run.log import events
from llmevo.run.log.changes import applied
from llmevo.run.log.storage import LOG, is_own, trust
from llmevo.search.optimizers import ASKING

TRUST = "--trust"


@dataclass(frozen=True)
class Use:
    """One thing that a config makes llmevo do."""

    kind: Literal["runs", "opens", "sends"]
    """It runs code, opens a file, or sends texts to a server."""
    what: str
    expected: bool = False
    """A server that the environment or llmevo itself names, and not the config."""

    def __str__(self) -> str:
        return f"{self.kind} {self.what}"


def uses(config: Config, root: Path) -> list[Use]:
    """All that a user's config makes a run execute, open and contact, apart from its models. `root`: where relative
    paths start. Opens the task files in its folders, to see which of them have Python functions.
    """
    found = [*_named(config, root)]
    for folder in config.task_search_path:
        if files := _with_functions(root / folder):
            more = f" and {len(files) - 5} more" if len(files) > 5 else ""
            found.append(Use("runs", f"the Python functions of {', '.join(files[:5])}{more} in {root / folder}"))
    if config.llm.prompts and config.search.optimizer in ASKING:
        found.append(Use("runs", f"the prompt templates in {root / config.llm.prompts} (llm.prompts), in a sandbox"))
    return found


def _named(config: Config, root: Path) -> list[Use]:
    """What stands in the config, without a look at any file. In a log, prompt templates stand beside the config."""
    return [*dict.fromkeys((*_code(config, root), *_files(config, root), *_servers(config)))]


def _code(config: Config, root: Path) -> Iterator[Use]:
    for task in (*config.tasks, *config.heldout):
        if task.function:
            file, _, name = task.function.rpartition(":")
            yield Use("runs", f"the Python file {root / file} (tasks.{task.name}.function: {name})")
    for folder in config.task_search_path:
        yield Use("runs", f"the task files in {root / folder} (task_search_path), which may hold Python functions")
    if config.engine.options:
        yield Use("runs", f"vLLM with engine.options: {config.engine.options}")


def _with_functions(folder: Path) -> list[str]:
    """The task files that name Python functions or classes, as far as that can be seen without running any."""
    found: list[str] = []
    for file in sorted(folder.rglob("*.y*ml")):
        try:
            code = re.search(r"!function|^\s*class\s*:", file.read_text(encoding="utf-8"), re.MULTILINE)
        except (OSError, ValueError):
            continue
        if code:
            found.append(file.name)
    return found


def _files(config: Config, root: Path) -> Iterator[Use]:
    llm, gate = config.llm, config.gate
    named: list[tuple[str, Path | str | None]] = [
        ("llm.api_key_file", llm.api_key_file),
        ("llm.transcript", llm.transcript if llm.proposer == "recorded" else None),
        ("gate.prompts", gate.prompts if gate else None),
    ]
    for task in (*config.tasks, *config.heldout):
        place = f"tasks.{task.name}"
        named += [(f"{place}.text", task.text), (f"{place}.prompts", task.prompts)]
        if task.judge:
            named += [(f"{place}.judge.{key}", getattr(task.judge, key)) for key in ("rubric", "api_key_file")]
    for key, file in named:
        if file is not None:
            yield Use("opens", f"the file {root / Path(file).expanduser()} ({key})")


def _servers(config: Config) -> Iterator[Use]:
    llm = config.llm
    if config.search.optimizer in ASKING and (llm.proposer == "openai" or (llm.proposer == "auto" and llm.base_url)):
        yield _server("prompts", llm.base_url, llm.api_key_file, llm.api_key_env, "llm")
    for task in (*config.tasks, *config.heldout):
        if task.judge:
            of = task.judge
            place = f"tasks.{task.name}.judge"
            yield _server("candidates' replies", of.base_url, of.api_key_file, of.api_key_env, place)
    for logger in config.loggers:
        options = ", ".join(f"{key}: {value}" for key, value in logger.items() if key != "name")
        yield Use("sends", f"scores and recipes to {logger['name']}{f' ({options})' if options else ''} (loggers)")


def _server(what: str, url: str | None, file: object, variable: str | None, place: str) -> Use:
    """Where texts go, and with which key."""
    own = is_own_server(url)
    key = f"the key in {file}" if file else variable or (VARIABLE if own else "no key of the environment")
    where = without_password(url) if url else "OpenAI's server, or that of OPENAI_BASE_URL"
    return Use("sends", f"{what} to {where} ({place}), with {key}", expected=own and not (file or variable))


def check(
    recorded: Sequence[events.Event],
    run: Path,
    trusted: bool,
    given: Config | None = None,
    root: Path | None = None,
) -> None:
    """Raise RunError where going on with a log, or scoring it again, would do what its reader has not agreed to.

    `given`: the reader's own config, with the `root` of its paths; what that does as well is agreed to. With `trusted`
    all is, and the log is taken for one's own from then on.
    """
    if trusted:
        trust(run)
        return
    if is_own(run):
        return
    agreed = {*_named(given, root or Path())} if given else set[Use]()
    folder = (root or Path()) / given.llm.prompts if given and given.llm.prompts else None
    found: list[Use] = []
    for started in _started(recorded):
        config, place = config_of(started, f"{run}/{LOG}"), root or (run if run.is_dir() else run.parent) / started.root
        found += [use for use in _named(config, place) if not use.expected and use not in agreed]
        found += [Use("runs", f"the log's prompt template {name}, in a sandbox") for name in _foreign(started, folder)]
    _refuse(found, run)


def check_templates(recorded: Sequence[events.Event], run: Path, trusted: bool) -> None:
    """The same where a log is only verified: of all that it names its prompt templates alone are used."""
    if trusted:
        trust(run)
    elif not is_own(run):
        names = [name for started in _started(recorded) for name in _foreign(started, None)]
        _refuse([Use("runs", f"the log's prompt template {name}, in a sandbox") for name in names], run)


def _refuse(found: Sequence[Use], run: Path) -> None:
    if found:
        listed = "\n".join(f"  {use}" for use in dict.fromkeys(found))
        raise RunError(
            f"{run} was begun on another machine or by an older llmevo, or its log has been changed. This command does"
            f" what the log says:\n{listed}\nIf you know where the log comes from and agree, add {TRUST}; that is"
            " remembered for this log"
        )


def _foreign(started: events.RunStarted, folder: Path | None) -> list[str]:
    return foreign(started.prompts, folder) if started.style else []


def _started(recorded: Sequence[events.Event]) -> Iterator[events.RunStarted]:
    """How the run began, and how it would have with what each `resumed` event has changed."""
    now: events.RunStarted | None = None
    for event in recorded:
        if isinstance(event, events.RunStarted):
            now = event
        elif isinstance(event, events.Resumed) and now:
            now = applied(now, event)
        else:
            continue
        if now:
            yield now
