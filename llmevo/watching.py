"""Following a run from outside: its log read as it grows, and whether anybody still writes it. Changes nothing."""

import errno
import fcntl
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from llmevo import display, events
from llmevo.config import parse_config
from llmevo.errors import RunError
from llmevo.picture import outcome
from llmevo.runlog import LOG, parse_event
from llmevo.state import RunState

POLL = 0.5
"""Seconds between two looks at a log."""


class Tail:
    """The log of a run that may still be written: every look gives what came since the last one."""

    def __init__(self, run: Path) -> None:
        self.file = run / LOG
        self._read, self._lines = 0, 0

    def new(self) -> list[events.Event]:
        """The events of the lines that were completed since; a half-written last line waits. None are there before the
        log is.

        Raises RunError for a line that is no event, and for a log that was cut or begun anew.
        """
        if not self.file.exists():
            return []
        with self.file.open("rb") as stream:
            size = stream.seek(0, 2)
            if size < self._read:
                raise RunError(f"{self.file} is shorter than it was: another run has begun in its place; watch it anew")
            stream.seek(self._read)
            content = stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        if b"\0" in whole:  # a block that a power cut has kept from the disk; a resume cuts it away
            whole = whole[: whole.rfind(b"\n", 0, whole.index(b"\0")) + 1]
        found: list[events.Event] = []
        for line in whole.splitlines():
            self._lines += 1
            found.append(parse_event(line, f"{self.file}:{self._lines}"))
        self._read += len(whole)
        return found


def is_written(run: Path) -> bool:
    """Whether a live process holds the log of a run.

    Asks by a shared lock that is given back at once: it is refused as long as somebody writes.
    """
    file = run / LOG
    if not file.exists():
        return False
    with file.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:  # a file system without locks says nothing of a writer
            return error.errno in (errno.EWOULDBLOCK, errno.EAGAIN)
    return False


def apply(state: RunState, event: events.Event, run: Path) -> None:
    """Fold one event. Raises RunError where it tells of a candidate that was never asked for."""
    try:
        state.apply(event)
    except KeyError as error:
        raise RunError(
            f"{run}: the log scores candidate {error}, which was never asked for; it has been changed"
        ) from None


def watch(console: Console, run: Path, patience: float, sleep: Callable[[float], None] = time.sleep) -> RunState:
    """Show a run as it goes on, from another terminal, until it ends or nobody writes it any more.

    What has happened already is shown at once, as one picture. Waits `patience` seconds for a run that is not there
    yet. Raises RunError when none comes, or when the log is broken.
    """
    tail, state = Tail(run), RunState()
    backlog = _begun(console, tail, patience, sleep)
    for event in backlog:
        apply(state, event, run)
    if state.started is None:
        return state
    config = parse_config(state.started.config, str(tail.file))
    with display.Display(console, config, run, loading="") as view:
        view.draw(state)
        best = f", best {outcome(state.best)}" if state.best else ""
        view.say(f"{run}: {config.search.budget.words(state)} so far{best}")
        while state.finished is None:
            # In this order: what a writer wrote before it went away is not missed.
            written = is_written(run)
            found = tail.new()
            for event in found:
                apply(state, event, run)
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
