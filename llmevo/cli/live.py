"""A run shown live, to its end or to a signal that stops it; shared by `run` and `resume`."""

import sys

import typer

from llmevo.cli import terminal
from llmevo.cli.voting import booth
from llmevo.config import Config
from llmevo.errors import ConfigError, JudgeError, LogError, MachineError, ProposerError, ProposerRefused, quoted
from llmevo.reports.terminal.live import Display, summary
from llmevo.reports.text import say
from llmevo.run import loop
from llmevo.run.experiment import Experiment
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import BEST, ROUTING, RunLog, holds_run
from llmevo.run.trackers import forwarded


def carry_on(experiment: Experiment, log: RunLog, config: Config) -> None:
    """Run to the end or to a signal, with a live display and the loggers of `config`; of a finished run show the
    summary alone.
    """
    folder, before = quoted(log.folder), RunState.fold(iter(log.recorded))
    if before.finished and not config.loggers and _is_whole(log, before):
        say(terminal.console, f"{log.folder} is finished; `llmevo resume {folder} --budget N` goes on.")
        summary(terminal.console, before, log.folder, experiment.config)
        return
    view = Display(terminal.console, experiment.scorer.config, log.folder, earlier=len(log.recorded))
    experiment.verdicts.ask_voter = booth(terminal.console, typer.getchar, view.paused) if _in_terminal() else None
    experiment.scorer.warn = view.warn
    view.doing = lambda: experiment.scorer.doing
    try:
        # The display ends first: loggers may be slow to send the rest.
        with forwarded(config.loggers, log.place, view.warn) as loggers, view:
            state = loop.carry_on(experiment, log, [view.show, *loggers])
    except (KeyboardInterrupt, ProposerError, ProposerRefused, JudgeError, MachineError) as error:
        if missing := log.missing:
            raise LogError(missing) from error
        begun = holds_run(log.folder)
        if not (begun or isinstance(error, KeyboardInterrupt)):
            raise  # there is nothing to resume
        again = f"`llmevo resume {folder}` goes on"
        match error:
            case ProposerError():
                raise ProposerError(f"{error} (llm.strict); {again} from here") from error
            case ProposerRefused():
                raise ProposerRefused(f"{error}; once that is solved, {again}") from error
            case MachineError():
                text = f"{error}. No candidate has failed and nothing is lost: {again} from here"
                raise MachineError(text, error.kind) from error
            case JudgeError():
                raise JudgeError(f"{error}. Nothing that was scored or judged is lost: {again} from here") from error
            case _:
                unbegun = "Stopped before the run began; start it with the same command."
                terminal.say_stopped(f"Stopped. Nothing is lost: {again}." if begun else unbegun)
                raise typer.Exit(130) from None
    summary(terminal.console, state, log.folder, experiment.config)


def _is_whole(log: RunLog, state: RunState) -> bool:
    """Whether a finished run has the files that are written beside its log."""
    best = state.best
    mixture = best and state.recipes[best.candidate.id].get("mixture")
    return all((log.place / name).exists() for name in (BEST, *([ROUTING] if mixture else [])) if best)


def warned(text: str) -> None:
    """Print a warning before a run is shown."""
    say(terminal.console, f"! {text}", "yellow")


def check_terminal(config: Config) -> None:
    """Raise ConfigError for a task that a person votes on, without a terminal."""
    voted = next((task.name for task in (*config.tasks, *config.heldout) if task.votes), None)
    if voted and not _in_terminal():
        raise ConfigError(f"tasks: {voted} is voted on by a person and needs a terminal; start the command in one")


def _in_terminal() -> bool:
    return terminal.console.is_terminal and sys.stdin.isatty()
