"""A run that goes on before one's eyes: to its end, or to Ctrl-C."""

import typer

from llmevo import display, forwarding, loop, terminal
from llmevo.bench import Bench
from llmevo.config import Config
from llmevo.errors import ProposerError
from llmevo.runlog import RunLog


def carry_on(bench: Bench, log: RunLog, config: Config) -> None:
    """Run to the end, or to Ctrl-C, showing what happens, and telling the loggers of `config`."""
    view = display.Display(terminal.console, bench.rig.config, log.folder)
    try:
        with view, forwarding.forwarded(config.loggers, log.folder, view.warn) as loggers:
            state = loop.carry_on(bench, log, [view.show, *loggers])
    except KeyboardInterrupt:
        terminal.console.print(f"\nStopped. Nothing is lost: `llmevo resume {log.folder}` goes on.", highlight=False)
        raise typer.Exit(130) from None
    except ProposerError as error:
        raise ProposerError(f"{error} (llm.strict); `llmevo resume {log.folder}` goes on from here") from error
    display.summary(terminal.console, state, log.folder, bench.config)
