"""`llmevo init`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import options, terminal
from llmevo.errors import UserError, quoted


def init(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="[MODEL…]", help="Models to merge: folders, adapters, hub ids.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The model that they were tuned from; read from adapters.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="A task of lm-eval, or your questions: a file with one JSON object a line. May be repeated."),
    ] = None,
    heldout: Annotated[
        list[str] | None,
        typer.Option(help="A task for the end, one for each --task; by default other questions of the same task."),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="quick, standard or thorough: 20, 60 or 150 candidates.")] = None,
    model: options.Model = None,
    base_url: options.BaseUrl = None,
    out: Annotated[Path, typer.Option(help="The config to write.")] = Path("config.yml"),
) -> None:
    """Write a config for models and questions, with comments.

    What is not given is asked for in a terminal, at most five questions. For files of questions, task files of lm-eval
    are written next to them, and next to the config `llmevo.schema.json`, with which editors complete and check its
    keys. Loads no weights and downloads no model.
    """
    if out.exists():
        raise UserError(f"{out} exists; name another file with --out")
    from llmevo.run import draft  # torch takes seconds to import

    listed = models or _asked("Models to merge, with spaces between them", "MODEL…").split()
    if len(listed) < 2 and base is None:
        raise UserError(f"MODEL: give two models or more to merge, or one and --base; got {' '.join(listed)}")
    origin = base or draft.base_of(listed)
    if origin is None and sys.stdin.isatty():
        origin = _asked("The model that they were tuned from (empty: unknown)", "--base", "") or None
    listed = draft.on_base(listed, origin)
    layers = draft.check_models(listed, origin)
    names = task or _asked("Tasks of lm-eval, or files with questions (.jsonl)", "--task").split()
    tasks = draft.draft_tasks(names, heldout or [])
    if model is None and sys.stdin.isatty():
        model = _asked("The LLM that proposes, such as gpt-4o (empty: chosen when the run starts)", "--model", "")
    if base_url and not model:
        raise UserError(f"--base-url {base_url}: give --model too, the LLM that this server has")
    size = preset or ("standard" if not sys.stdin.isatty() else _asked("quick, standard or thorough", "", "standard"))
    if size not in draft.PRESETS:
        raise UserError(f"--preset: {size!r} is unknown; give one of {', '.join(draft.PRESETS)}")
    chat = draft.has_chat_template(origin or listed[0])
    placed = [draft.placed(each, out.parent) for each in listed]
    origin = draft.placed(origin, out.parent) if origin else None
    every = [*tasks, *(each.heldout for each in tasks if each.heldout)]
    folders = draft.folders(every, out.parent)
    made = draft.Draft(placed, origin, tasks, size, model or "", base_url or "", layers, folders, chat)
    for repeated in filter(None, (each.repeated for each in every)):
        terminal.console.print(f"! {repeated}, and make no score more certain; leave them out.", soft_wrap=True)
    _write(out, made.text(), {each.file: each.description for each in every if each.file})


def _asked(question: str, option: str, default: str | None = None) -> str:
    """Return the answer of the user. Raises UserError where there is no terminal to ask in."""
    if not sys.stdin.isatty():
        raise UserError(f"{option} is missing: {question[0].lower()}{question[1:]}")
    return typer.prompt(question, default=default, show_default=bool(default))


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode()


def _write(out: Path, text: str, files: dict[Path, str]) -> None:
    import yaml

    from llmevo.config import parse_config
    from llmevo.models.files import write_whole
    from llmevo.run import draft

    parse_config(yaml.safe_load(text), str(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out.parent} cannot be made ({error.strerror}); name another file with --out") from error
    if there := [file for file in files if file.exists() and not _holds(file, files[file])]:
        raise UserError(f"{there[0]} exists and describes another task; remove it, or rename the file of questions")
    for file, content in {**files, out.parent / draft.SCHEMA: draft.schema_text(), out: text}.items():
        try:
            write_whole(file, content.encode())
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error.strerror})") from error
        terminal.console.print(f"{file} written.", soft_wrap=True)
    terminal.console.print(f"Next: llmevo inspect {quoted(out)}; then: llmevo run {quoted(out)}", soft_wrap=True)
