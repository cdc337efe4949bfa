"""Following a run from outside: its log read as it grows, and whether anybody still writes it. Changes nothing."""

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from llmevo.config import parse_logged
from llmevo.errors import RunError
from llmevo.reports.terminal.live import Display
from llmevo.reports.terminal.panel import outcome
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, Tail, is_written
from llmevo.run.spending import Spending

POLL = 0.5
"""Seconds between two looks at a log."""


def watch(console: Console, run: Path, patience: float, sleep: Callable[[float], None] = time.sleep) -> RunState:
    """Show a run as it goes on, from another terminal, until it ends or nobody writes it any more.

    What has happened already is shown at once, as one picture. Waits `patience` seconds for a run that is not there
    yet. Raises RunError when none comes, or when the log is broken.
    """
    tail, state = Tail(run), RunState()
    backlog = _begun(console, tail, patience, sleep)
    for event in backlog:
        state.apply(event)
    if state.started is None:
        return state
    config = parse_logged(state.started.config, str(tail.file))
    with Display(console, config, run, loading="") as view:
        view.draw(state)
        best = f", best {outcome(state.best)}" if state.best else ""
        view.say(f"{run}: {Spending(config.search.budget, state)} so far{best}")
        while state.finished is None:
            # In this order: what a writer wrote before it went away is not missed.
            written = is_written(run)
            found = tail.new()
            for event in found:
                state.apply(event)
                view.show(event, state)
            if not written and not found:
                break
            if not found:
                sleep(POLL)
    return state


def _begun(console: Console, tail: Tail, patience: float, sleep: Callable[[float], None]) -> list[events.Event]:
    """The events so far, once there are any; none when a run has died before its first."""
    run, waited = tail.file.parent, 0.0
    while not (found := tail.new()):
        if tail.file.exists() and not is_written(run):
            found = tail.new()
            break
        if not tail.file.exists() and waited >= patience:
            raise RunError(f"{run} holds no run (there is no {LOG}), and none came in {patience:g} s")
        if not waited:
            console.print(f"Waiting for {run} to begin; Ctrl-C ends the waiting.", highlight=False, markup=False)
        sleep(POLL)
        waited += POLL
    return found
