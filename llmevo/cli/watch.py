"""`llmevo watch`."""

from typing import Annotated

import typer

from llmevo.cli import terminal
from llmevo.cli.options import RunFolder
from llmevo.config import parse_logged
from llmevo.errors import quoted
from llmevo.reports.terminal.live import Display, summary
from llmevo.reports.terminal.live import watch as follow
from llmevo.reports.text import say


def watch(
    run: RunFolder,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a run that has not begun.")] = 600.0,
) -> None:
    """Follow a run from another terminal, without changing it.

    Exit status: 0 when the run is finished, 1 when it has stopped before its end.
    """
    try:
        state = follow(terminal.console, run, wait)
    except KeyboardInterrupt:
        terminal.say_stopped("No longer watching; the run is left as it is.")
        raise typer.Exit(130) from None
    config = parse_logged(state.started.config, str(run)) if state.started else None
    if config and state.finished:
        summary(terminal.console, state, run, config)
        return
    if config and terminal.console.is_terminal:
        view = Display(terminal.console, config, run)
        terminal.console.print(view.picture(state, terminal.console.height - 2))
    on = f"`llmevo resume {quoted(run)}` goes on with it" if config else "start it with `llmevo run` as before"
    say(terminal.console, f"No process writes {run} any more, and it is not finished; {on}.", "yellow")
    raise typer.Exit(1)
