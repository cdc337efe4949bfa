"""`llmevo status`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from llmevo.cli import terminal
from llmevo.errors import RunError
from llmevo.reports.terminal.status import status as status_of
from llmevo.reports.terminal.status import table
from llmevo.run.log.storage import runs_below

RUNS = Path("runs")


def status(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN…]", help="Runs, or folders with runs in them; ./runs by default."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: a list, one object a run.")] = False,
) -> None:
    """List runs: running, stopped, finished or broken, how far, how good, and how long still."""
    found = [(place, runs_below(place)) for place in runs or [RUNS]]
    for place, below in found:
        if runs and not below:
            raise RunError(f"{place} holds no run, and no folder in it does; start one with `llmevo run CONFIG`")
    statuses = [status_of(run) for run in dict.fromkeys(run for _, below in found for run in below)]
    if as_json:
        print(json.dumps([each.as_dict() for each in statuses], indent=1, allow_nan=False))
    elif statuses:
        terminal.console.print(table(statuses), highlight=False)
    else:
        terminal.console.print(f"No run lies below ./{RUNS}; start one with `llmevo run CONFIG`.", highlight=False)
