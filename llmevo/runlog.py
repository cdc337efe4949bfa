"""The run folder: an append-only log that is the run, and what it folds to."""

import errno
import fcntl
import json
import os
import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Self

from llmevo import events
from llmevo.aims import Aims, Held, Keeping, front, held
from llmevo.changes import applied
from llmevo.config import parse_config
from llmevo.durable import sync, write_whole
from llmevo.errors import ConfigError, LogError, RunError
from llmevo.judging import Book
from llmevo.tasks import Task
from llmevo.tasks.names import paired
from llmevo.trial import Candidate, Trial

LOG = "events.jsonl"

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when there is no more room."""

PATIENCE = 0.5
"""Seconds to wait for a log in use: `llmevo status` and `watch` hold it for a moment."""


@dataclass
class RunState:
    """What the log says so far. Changes only by `apply`; the live run and every reader share this."""

    started: events.RunStarted | None = None
    """How the run began, with what `resumed` events have changed of it since."""
    resumed: list[events.Resumed] = field(default_factory=list[events.Resumed])
    prompted: list[events.Prompted] = field(default_factory=list[events.Prompted])
    judged: list[events.Judged] = field(default_factory=list[events.Judged])
    book: Book = field(default_factory=Book)
    """What judges and voters have said."""
    candidates: dict[int, Candidate] = field(default_factory=dict[int, Candidate])
    recipes: dict[int, dict[str, object]] = field(default_factory=dict[int, dict[str, object]])
    trials: dict[int, Trial] = field(default_factory=dict[int, Trial])
    selected: dict[int, events.Selected] = field(default_factory=dict[int, events.Selected])
    told: list[events.Told] = field(default_factory=list[events.Told])
    heldout: dict[str, events.HeldOut] = field(default_factory=dict[str, events.HeldOut])
    finished: events.RunFinished | None = None
    latest: datetime | None = None
    """When the last event was written."""
    aims: Aims = field(default_factory=Aims)
    """What the run's config searches for."""

    @classmethod
    def fold(cls, log: Iterator[events.Event]) -> Self:
        state = cls()
        for event in log:
            state.apply(event)
        return state

    @property
    def seconds(self) -> float:
        """From the first event to the last, pauses included."""
        if self.started is None or self.latest is None:
            return 0.0
        return (self.latest - datetime.fromisoformat(self.started.time)).total_seconds()

    def apply(self, event: events.Event) -> None:
        self.latest = datetime.fromisoformat(event.time)
        match event:
            case events.RunStarted():
                self.started = event
                self.aims = _aims_of(event)
            case events.Resumed():
                self._resume(event)
            case events.Prompted():
                self.prompted.append(event)
            case events.Judged():
                self.judged.append(event)
                self.book.take(event)
            case events.Presented() | events.Voted():
                self.book.take(event)
            case events.Asked():
                self.candidates |= {candidate.id: candidate for candidate in event.read()}
                self.recipes |= {candidate["id"]: candidate["recipe"] for candidate in event.candidates}
            case events.Evaluated():
                candidate = self._candidate(event.candidate)
                self.trials[candidate.id] = Trial(candidate, event.read(), seconds=event.seconds)
                self._judge(candidate)
            case events.Selected():
                self._candidate(event.candidate)
                self.selected[event.candidate] = event
                self._judge()
            case events.Failed():
                candidate = self._candidate(event.candidate)
                self.trials[candidate.id] = Trial(candidate, None, event.reason, event.seconds)
                self._judge(candidate)
            case events.Told():
                self.told.append(event)
            case events.HeldOut():
                self.heldout[event.row] = event
            case events.RunFinished():
                self.finished = event

    def _candidate(self, number: int) -> Candidate:
        if number not in self.candidates:
            raise RunError(f"the log scores candidate {number}, which was never asked for; it has been changed by hand")
        return self.candidates[number]

    @property
    def keeping(self) -> Keeping:
        """What holds trials against the constraints."""
        return Keeping(self.aims, self.trials, {number: event.read() for number, event in self.selected.items()})

    def _judge(self, candidate: Candidate | None = None) -> None:
        """Hold a candidate against the constraints, or all of them, once the start rows have told the bounds."""
        begun = len(self.trials) == len(self.candidates) or any(c.generation for c in self.candidates.values())
        if not self.aims.constraints or not begun:
            return
        keeping, single = self.keeping, candidate is not None and candidate.generation
        for number in [candidate.id] if candidate and single else [*self.trials]:
            self.trials[number] = keeping.judged(self.trials[number])

    def _resume(self, event: events.Resumed) -> None:
        """A finished run that goes on is not finished. Rows held out with other questions or models do not compare."""
        self.resumed.append(event)
        self.started = applied(self.started, event) if self.started else None
        self.finished = None
        if any(change.key.startswith(("questions.", "sources.")) for change in event.forced):
            self.heldout = {}

    @property
    def heldout_tasks(self) -> list[Task]:
        """What is held out, as the run's config says."""
        return parse_config(self.started.config, LOG).heldout_tasks if self.started else []

    @property
    def heldout_kept(self) -> list[Held]:
        """Each constraint on the held-out questions, for the best; empty where nothing is held out."""
        best, tasks = self.heldout.get("best"), self.heldout_tasks if self.aims.constraints else []
        if best is None or not tasks:
            return []
        metrics = {task.name: task.metric for task in tasks}
        pairs = {task: (other, metrics[other]) for task, other in paired([*self.aims.tasks], [*metrics]).items()}
        rows = {row.candidate: row.read() for row in self.heldout.values() if row.candidate is not None}
        return held(self.keeping, pairs, rows, best.read())

    @property
    def unmet(self) -> str:
        """Which constraints the best violates, in words: no candidate keeps them all. Empty where one does."""
        best = self.best
        return f"no candidate keeps all constraints; the best {best.reason}" if best and best.violation else ""

    @property
    def front(self) -> list[Trial]:
        """The Pareto front of the candidates that were asked everything, the highest score first; empty where the
        objective is a sum.
        """
        return front(self.asked_all, self.aims) if self.aims.pareto else []

    @property
    def best(self) -> Trial | None:
        """The trial to hand over: the one with the highest score, and once all finalists were asked further questions,
        the best of them by all they were asked. The earlier one of equals. Whoever keeps the constraints is better
        than whoever does not.
        """
        finalists = [self.trials[n] for n, event in self.selected.items() if event.generation == len(self.told)]
        if finalists and len(finalists) == self.selected[finalists[0].candidate.id].finalists:
            return max(finalists, key=lambda trial: (-trial.violation, self.pooled(trial)))
        return self.leader

    @property
    def leader(self) -> Trial | None:
        """The trial with the highest score on the search questions, of those that keep the constraints."""
        if self.aims.constraints:  # whether one that was stopped keeps them is not known
            return next(iter(self.asked_all), None)
        scored = [trial for trial in self.trials.values() if trial.score]
        return max(scored, key=lambda trial: trial.value, default=None)

    def pooled(self, trial: Trial) -> float:
        """A finalist's score on search and selection questions together."""
        score, further = trial.score, self.selected[trial.candidate.id]
        assert score
        return (score.total * score.items + further.score * further.items) / (score.items + further.items)

    @property
    def asked_all(self) -> list[Trial]:
        """The trials that were stopped by nothing, the best first, the earlier one of equals."""
        items = max((trial.score.items for trial in self.trials.values() if trial.score), default=0)
        whole = [trial for trial in self.trials.values() if trial.score and trial.score.items == items]
        return sorted(whole, key=lambda trial: trial.rank, reverse=True)

    @property
    def best_parent(self) -> Trial | None:
        parents = [t for t in self.trials.values() if t.score and t.candidate.origin == "parent"]
        return max(parents, key=lambda trial: trial.value, default=None)


def _aims_of(started: events.RunStarted) -> Aims:
    """Of most logs known without reading the whole config."""
    search = started.config.get("search") or {}
    if not started.config.get("constraints") and search.get("objective", "sum") == "sum":
        return Aims()
    try:
        return parse_config(started.config, LOG).aims
    except ConfigError:  # of another version; whoever needs the config says so
        return Aims()


class RunLog:
    """The log of one run, open for appending by one process.

    Every line is written and synced before `append` returns, so what a run has paid for is never lost.
    """

    def __init__(self, folder: Path, resume: bool = False) -> None:
        """Raises RunError when the folder holds another run, when there is none to resume, or when it is in use, and
        LogError when it cannot be written.
        """
        self.folder, self.file = folder, folder / LOG
        if resume and not self.file.exists():
            raise RunError(f"{folder} holds no run (there is no {LOG}); start one with `llmevo run CONFIG`")
        if not resume:
            check_free(folder)
        with _errors(self.file):
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        _OPEN.add(self)
        try:
            _lock(self._descriptor, folder)
            if not resume:  # another process may have begun one since
                check_free(folder)
            content = self.file.read_bytes()
            self.recorded = [*_events(content, self.file)]
            self._size = _whole(content)
            with _errors(self.file):
                os.truncate(self._descriptor, self._size)
                os.lseek(self._descriptor, self._size, os.SEEK_SET)
                sync(folder)  # a new file's name is not on the disk before its folder is
        except BaseException:
            self.close()
            raise

    def append(self, event: events.Event) -> None:
        """Raises LogError when the disk is full or fails; the log is then as it was before."""
        line = (event.model_dump_json(by_alias=True) + "\n").encode()
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except BaseException as error:
            if rest or isinstance(error, OSError):  # Ctrl-C after the whole line loses nothing
                self._undo()
            if isinstance(error, OSError):
                raise _failure(self.file, error) from error
            raise
        self._size += len(line)

    def _undo(self) -> None:
        """Cut away a line that was written in part. Where even that fails, the next one to open the log does it."""
        try:
            os.truncate(self._descriptor, self._size)
            os.lseek(self._descriptor, self._size, os.SEEK_SET)
        except OSError:
            pass

    def write(self, name: str, text: str) -> None:
        """A file beside the log, replaced as a whole or not at all. Raises LogError."""
        with _errors(self.folder / name):
            write_whole(self.folder / name, text.encode())

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_OPEN: weakref.WeakSet[RunLog] = weakref.WeakSet()


def _close_inherited() -> None:
    """A child process that outlives this one must not hold its log."""
    for log in _OPEN:
        log.close()


os.register_at_fork(after_in_child=_close_inherited)


def _lock(descriptor: int, folder: Path) -> None:
    """Raises RunError when another process holds the log."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > until:
                raise RunError(f"{folder} is being written by another process; wait for it, or stop it") from None
            time.sleep(PATIENCE / 10)
        else:
            return


@contextmanager
def _errors(file: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise _failure(file, error) from error


def _failure(file: Path, error: OSError) -> LogError:
    what = "disk full" if error.errno in FULL else "the disk fails"
    return LogError(
        f"{what}: {file} cannot be written ({error.strerror}). Nothing that was scored is lost:"
        f" once that is mended, `llmevo resume {file.parent}` goes on"
    )


def holds_run(folder: Path) -> bool:
    """A log without a whole line is no run: it was stopped before anything happened."""
    file = folder / LOG
    return file.exists() and b"\n" in file.read_bytes()


def check_free(folder: Path) -> None:
    """Raise RunError when the folder holds a run."""
    if holds_run(folder):
        raise RunError(f"{folder} holds a run already; go on with `llmevo resume {folder}`, or choose another --out")


def read_log(run: Path) -> list[events.Event]:
    """The events of a run's folder, for readers. A line still being written is left out."""
    file = run / LOG if run.is_dir() else run
    if not file.exists():
        raise RunError(f"{run} holds no run (there is no {LOG})")
    return [*_events(file.read_bytes(), file)]


def _whole(content: bytes) -> int:
    """How much of a log is whole lines.

    A last line without its newline was torn by a crash, and so was one with zeros in it: a block that a power cut has
    kept from the disk.
    """
    whole = content.rfind(b"\n") + 1
    before = content.rfind(b"\n", 0, max(0, whole - 1)) + 1
    return before if b"\0" in content[before:whole] else whole


def _events(content: bytes, file: Path) -> Iterator[events.Event]:
    for number, line in enumerate(content[: _whole(content)].splitlines(), start=1):
        yield parse_event(line, f"{file}:{number}")


def parse_event(line: bytes, place: str) -> events.Event:
    """One line of a log; `place` is where it stands, for the RunError of a line that is none."""
    try:
        raw = json.loads(line)
        if raw.get("schema", 0) > events.SCHEMA:
            raise RunError(f"{place}: was written by a newer llmevo (schema {raw['schema']}); update llmevo to read it")
        return events.EVENTS.validate_python(raw)
    except (ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{place}: is no event of llmevo ({reason}); the log has been changed by hand") from error
