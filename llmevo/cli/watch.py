"""`llmevo watch`."""

from typing import Annotated

import typer

from llmevo.cli import terminal
from llmevo.cli.options import RunFolder
from llmevo.config import parse_logged
from llmevo.reports.terminal.live import Display, summary
from llmevo.reports.terminal.watch import watch as follow


def watch(
    run: RunFolder,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a run that is not there yet.")] = 600.0,
) -> None:
    """Follow a run from another terminal; ends with it, and leaves it alone.

    Exit status: 0 when the run is finished, 1 when it has stopped before its end.
    """
    try:
        state = follow(terminal.console, run, wait)
    except KeyboardInterrupt:
        terminal.say_stopped("No longer watching; the run is left as it is.")
        raise typer.Exit(130) from None
    if state.started and state.finished:
        summary(terminal.console, state, run, parse_logged(state.started.config, str(run)))
        return
    if state.started and terminal.console.is_terminal:
        view = Display(terminal.console, parse_logged(state.started.config, str(run)), run)
        terminal.console.print(view.picture(state, terminal.console.height - 2))
    terminal.console.print(
        f"Nobody writes {run} any more, and it is not finished; `llmevo resume {run}` goes on with it.",
        style="yellow",
        highlight=False,
        soft_wrap=True,
    )
    raise typer.Exit(1)
