"""`llmevo tasks`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from llmevo.cli import terminal
from llmevo.cli.options import TaskFolders
from llmevo.config import read_config
from llmevo.evaluation.tasks.files import near

if TYPE_CHECKING:  # lm-eval takes seconds to import
    from llmevo.evaluation.tasks.listing import ListedTask


def tasks(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="A config: lists the tasks of its task_search_path.")
    ] = None,
    task_search_path: TaskFolders = None,
    built_in: Annotated[
        bool, typer.Option("--built-in", help="Also lm-eval's own; the default without a folder.")
    ] = False,
    match: Annotated[str, typer.Option(help="Only names that match, such as 'arc*'.")] = "*",
    trainable: Annotated[
        bool, typer.Option("--trainable", help="Only tasks with a training split, and the name that selects it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a list with one object a task.")] = False,
) -> None:
    """List tasks with their metrics and splits. Reads task files only, and downloads nothing."""
    from llmevo.evaluation.tasks.listing import list_tasks

    folders = [*(task_search_path or [])]
    if config is not None:
        folders += [config.parent / folder for folder in read_config(config).task_search_path]
    known = [*list_tasks(folders, built_in or not folders)]
    found = [
        task
        for task in known
        if (task.train or not trainable)
        and (fnmatch(task.name, match) or (trainable and fnmatch(task.train or "", match)))
    ]
    if as_json:
        print(json.dumps([asdict(task) for task in found], indent=1))
    elif found:
        terminal.console.print(table(found, trainable))
    else:
        terminal.console.print(_nothing(known, match, trainable, built_in or not folders))


def _nothing(known: "Sequence[ListedTask]", match: str, trainable: bool, built_in: bool) -> str:
    """Say why no task is listed, and what to do."""
    if not trainable and (of := next((task for task in known if task.train and fnmatch(task.train, match)), None)):
        return f"{of.train} is {of.name} on its training split, {of.train_split!r}; add --trainable to list such names."
    if trainable and match == "*":
        return (
            "None of these tasks has a training split. Your own may be searched on as they are;"
            " `llmevo tasks --built-in --trainable` lists lm-eval's that have one."
        )
    if trainable and any(fnmatch(task.name, match) for task in known):
        return f"No task that matches {match!r} has a training split; without --trainable they are listed."
    more = "" if built_in else "; `llmevo tasks --built-in` lists lm-eval's own"
    return f"No task matches {match!r}{near(match, [task.name for task in known])}{more}."


def table(found: "list[ListedTask]", trainable: bool) -> Table:
    """Return one row a task; the scored split has a star, and row counts are those on this machine."""
    made = Table(box=None, pad_edge=False, caption="* is the split that is scored", caption_justify="left")
    for column in ("write", "its split") if trainable else ("task", "asks"):
        made.add_column(column, overflow="fold")
    for column in ("metrics", "splits", "data"):
        made.add_column(column, overflow="fold")
    for task in found:
        splits = "\n".join(
            f"{name}{'*' if name == task.scored else ''}{'' if rows is None else f' {rows:,}'}"
            for name, rows in task.splits.items()
        )
        first = [task.train or "", task.train_split or ""] if trainable else [task.name, task.output or "Python"]
        made.add_row(*first, "\n".join(task.metrics), splits, task.data or "local")
    return made
