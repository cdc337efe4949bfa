"""`llmevo replay`."""

import io
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from llmevo import display, loop, terminal
from llmevo.bench import Bench
from llmevo.journal import EndOfRecordError, Journal
from llmevo.options import RunFolder
from llmevo.runlog import RunState, read_log


def replay(
    run: RunFolder,
    verify: Annotated[bool, typer.Option("--verify", help="Recompute it from the log; fail on a difference.")] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Save the display as it was in the end, as SVG.", show_default=False)
    ] = None,
) -> None:
    """Show a run again, from its log alone."""
    recorded = read_log(run)
    state = RunState.fold(iter(recorded))
    bench = Bench.of_log(state.started, run)
    settings = bench.config
    if picture:
        canvas = Console(record=True, width=118, file=io.StringIO(), force_terminal=True)
        canvas.print(display.Display(canvas, settings, run).picture(state))
        canvas.save_svg(str(picture), title="llmevo run")
        return
    if not verify:
        view, shown = display.Display(terminal.console, settings, run), RunState()
        for event in recorded:
            shown.apply(event)
            if line := view.line(event, shown):
                terminal.console.print(line, highlight=False, markup=False, soft_wrap=True)
        display.summary(terminal.console, state, run, settings)
        return
    try:
        loop.run(bench, Journal(recorded))
    except EndOfRecordError:
        terminal.console.print("The run is unfinished; `llmevo resume` goes on with it.")
    terminal.console.print(
        f"Verified: {len(recorded)} events follow from the config, the LLM's replies and the scores."
    )
