"""`llmevo tasks`."""

import json
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from llmevo.cli import terminal
from llmevo.cli.options import TaskFolders
from llmevo.config import read_config

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
    found = [
        task
        for task in list_tasks(folders, built_in or not folders)
        if fnmatch(task.name, match) and (task.train or not trainable)
    ]
    if as_json:
        print(json.dumps([asdict(task) for task in found], indent=1))
    elif found:
        terminal.console.print(table(found, trainable))
    elif trainable:
        terminal.console.print(
            "None of these tasks has a training split. Your own may be searched on as they are;"
            " `llmevo tasks --built-in --trainable` lists lm-eval's that have one."
        )
    else:
        terminal.console.print("There is no such task; `llmevo tasks --built-in` lists lm-eval's own.")


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
