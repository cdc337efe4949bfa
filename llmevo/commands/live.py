"""A run that goes on before one's eyes: to its end, or to Ctrl-C."""

import typer

from llmevo import display, loop, terminal
from llmevo.bench import Bench
from llmevo.errors import ProposerError
from llmevo.runlog import RunLog


def carry_on(bench: Bench, log: RunLog) -> None:
    """Run to the end, or to Ctrl-C, showing what happens."""
    view = display.Display(terminal.console, bench.rig.config, log.folder)
    try:
        with view:
            state = loop.carry_on(bench, log, [view.show])
    except KeyboardInterrupt:
        terminal.console.print(f"\nStopped. Nothing is lost: `llmevo resume {log.folder}` goes on.", highlight=False)
        raise typer.Exit(130) from None
    except ProposerError as error:
        raise ProposerError(f"{error} (llm.strict); `llmevo resume {log.folder}` goes on from here") from error
    display.summary(terminal.console, state, log.folder, bench.config)
