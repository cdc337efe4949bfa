"""The code, files and servers that a config uses, and the user's consent to those of a log from elsewhere.

A config is code that its user has chosen. A log is data, which may come from elsewhere or may have been edited. To
show, report and verify a log uses nothing that it names. To export it reads its models and the texts of its `prepare`;
it loads the tasks only where these texts, or a mixture's router, are made from questions that the run's folder lacks.
To resume it or score it again uses all of it. A log that this user has not begun on this machine
(`run.log.storage.is_own`) needs `--trust` to load its tasks, to be resumed or to be scored again.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
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


@dataclass(frozen=True)
class Use:
    """Code, a file or a server that a config uses."""

    kind: Literal["runs", "opens", "sends"]
    what: str
    expected: bool = False
    """Whether it is a server of the environment or of llmevo's defaults, and not of the config."""

    def __str__(self) -> str:
        return f"{self.kind} {self.what}"


def uses(config: Config, root: Path, key: str = "") -> list[Use]:
    """Return everything that a run of a user's config uses, apart from its models; relative paths start at `root`.

    `key` names the place of the LLM's key where the config does not, such as `--api-key`. Reads the task files in the
    config's folders, to find those with Python functions.
    """
    found, path = _named(config, root, key), config.genome.path
    rows = [("search.start_from", row) for row in config.search.start_from if isinstance(row, Path)]
    found += _opened([("genome.path.scan", path.scan if path else None), *rows], root)
    for folder in config.task_search_path:
        if files := _with_functions(root / folder):
            more = f" and {len(files) - 5} more" if len(files) > 5 else ""
            found.append(Use("runs", f"the Python functions of {', '.join(files[:5])}{more} in {root / folder}"))
    if config.llm.prompts and config.search.optimizer in ASKING:
        found.append(Use("runs", f"the prompt templates in {root / config.llm.prompts} (llm.prompts), in a sandbox"))
    return found


def _named(config: Config, root: Path, key: str = "") -> list[Use]:
    """The uses that the config alone shows, without what a log holds itself: prompt templates, start rows, a scan."""
    return [*dict.fromkeys((*_code(config, root), *_files(config, root), *_servers(config, key)))]


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
    """The task files that name Python functions or classes, as far as their text shows it."""
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
    llm, gate, prepare = config.llm, config.gate, config.genome.prepare
    named: list[tuple[str, Path | str | None]] = [
        ("llm.api_key_file", llm.api_key_file),
        ("llm.transcript", llm.transcript if llm.proposer == "recorded" else None),
        ("gate.prompts", gate.prompts if gate else None),
        ("genome.prepare.text", prepare.text if prepare else None),
    ]
    for task in (*config.tasks, *config.heldout):
        place = f"tasks.{task.name}"
        named += [(f"{place}.text", task.text), (f"{place}.prompts", task.prompts)]
        if task.judge:
            named += [(f"{place}.judge.{key}", getattr(task.judge, key)) for key in ("rubric", "api_key_file")]
    yield from _opened(named, root)


def _opened(named: Iterable[tuple[str, Path | str | None]], root: Path) -> Iterator[Use]:
    for key, file in named:
        if file is not None:
            yield Use("opens", f"the file {root / Path(file).expanduser()} ({key})")


def _servers(config: Config, key: str) -> Iterator[Use]:
    llm = config.llm
    names_server = llm.proposer == "openai" or (
        llm.proposer == "auto" and (llm.base_url or llm.model or llm.api_key_file or llm.api_key_env)
    )
    if config.search.optimizer in ASKING and names_server:
        yield _server("prompts", llm.base_url, llm.api_key_file, key or llm.api_key_env, "llm")
    for task in (*config.tasks, *config.heldout):
        if task.judge:
            of = task.judge
            place = f"tasks.{task.name}.judge"
            yield _server("candidates' replies", of.base_url, of.api_key_file, of.api_key_env, place)
    for logger in config.loggers:
        options = ", ".join(f"{key}: {value}" for key, value in logger.items() if key != "name")
        yield Use("sends", f"scores and recipes to {logger['name']}{f' ({options})' if options else ''} (loggers)")


def _server(what: str, url: str | None, file: object, variable: str | None, place: str) -> Use:
    """A server that gets texts, with its key."""
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
    """Raise RunError where resuming a log, or scoring it again, needs the user's consent.

    The uses of `given`, the user's own config with the `root` of its paths, need none. `trusted` is the consent to all,
    and marks the log as the user's own.
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
    """Raise RunError where verifying a log needs the user's consent, which uses only its prompt templates."""
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
            f" what the log says:\n{listed}\nIf you know where the log comes from and agree, add --trust; that is"
            " remembered for this log"
        )


def _foreign(started: events.RunStarted, folder: Path | None) -> list[str]:
    return foreign(started.prompts, folder) if started.style else []


def _started(recorded: Sequence[events.Event]) -> Iterator[events.RunStarted]:
    """The start of the run, and the same with the changes of each `resumed` event."""
    now: events.RunStarted | None = None
    for event in recorded:
        if isinstance(event, events.RunStarted):
            now = event
            yield now
        elif isinstance(event, events.Resumed) and now:
            now = applied(now, event)
            yield now
