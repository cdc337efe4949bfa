"""`llmevo status`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import terminal
from llmevo.errors import RunError
from llmevo.reports.terminal.status import status as status_of
from llmevo.reports.terminal.status import table
from llmevo.run.log.storage import runs_below


def status(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN…]", help="Runs, or folders that contain runs; ./runs by default."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a list with one object a run.")] = False,
) -> None:
    """List runs with their state, progress, best score and time left."""
    found = [(place, runs_below(place)) for place in runs or [Path("runs")]]
    for place, below in found:
        if runs and not below:
            raise RunError(f"{place} holds no run, and no folder in it does; start one with `llmevo run CONFIG`")
    statuses = [status_of(run) for run in dict.fromkeys(run for _, below in found for run in below)]
    if as_json:
        print(json.dumps([asdict(each) for each in statuses], indent=1, allow_nan=False))
    elif statuses:
        terminal.console.print(table(statuses))
    else:
        terminal.console.print("There is no run below ./runs; start one with `llmevo run CONFIG`.")
