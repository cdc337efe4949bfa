"""A run that goes on before one's eyes: to its end, or to Ctrl-C or another signal that stops it."""

import shlex
import sys

import typer

from llmevo.cli import terminal
from llmevo.cli.voting import booth
from llmevo.config import Config
from llmevo.errors import ConfigError, JudgeError, LogError, MachineError, ProposerError, ProposerRefused
from llmevo.reports.terminal.live import Display, summary
from llmevo.run import loop
from llmevo.run.experiment import Experiment
from llmevo.run.log.storage import RunLog, holds_run
from llmevo.run.trackers import forwarded


def carry_on(experiment: Experiment, log: RunLog, config: Config) -> None:
    """Run to the end, or to a signal that stops it, showing what happens, and telling the loggers of `config`."""
    folder = shlex.quote(str(log.folder))
    view = Display(terminal.console, experiment.scorer.config, log.folder)
    experiment.verdicts.ask_voter = booth(terminal.console, typer.getchar, view.paused) if _in_terminal() else None
    experiment.scorer.warn = view.warn
    try:
        # The display ends first: loggers may take long to send the rest.
        with forwarded(config.loggers, log.place, view.warn) as loggers, view:
            state = loop.carry_on(experiment, log, [view.show, *loggers])
    except (KeyboardInterrupt, ProposerError, ProposerRefused, JudgeError, MachineError) as error:
        if missing := log.missing:
            raise LogError(missing) from error
        match error:
            case ProposerError():
                raise ProposerError(f"{error} (llm.strict); `llmevo resume {folder}` goes on from here") from error
            case ProposerRefused():
                raise ProposerRefused(f"{error}; once that is solved, `llmevo resume {folder}` goes on") from error
            case MachineError():
                raise MachineError(
                    f"{error}. No candidate has failed and nothing is lost: `llmevo resume {folder}` goes on from here",
                    error.kind,
                ) from error
            case JudgeError():
                raise JudgeError(
                    f"{error}. Nothing that was scored or judged is lost: `llmevo resume {folder}` goes on from here"
                ) from error
            case _:
                begun = holds_run(log.folder)
                terminal.say_stopped(
                    f"Stopped. Nothing is lost: `llmevo resume {folder}` goes on."
                    if begun
                    else "Stopped before the run began; start it with the same command."
                )
                raise typer.Exit(130) from None
    summary(terminal.console, state, log.folder, experiment.config)


def warned(text: str) -> None:
    """What a person should know before a run is shown."""
    terminal.console.print(f"! {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def check_terminal(config: Config) -> None:
    """Raise ConfigError when a person should vote and there is no terminal to do it in."""
    voted = next((task.name for task in (*config.tasks, *config.heldout) if task.votes), None)
    if voted and not _in_terminal():
        raise ConfigError(f"tasks: {voted} is voted on by a person and needs a terminal; start the command in one")


def _in_terminal() -> bool:
    return terminal.console.is_terminal and sys.stdin.isatty()
