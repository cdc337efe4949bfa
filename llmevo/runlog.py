"""The run folder: an append-only log that is the run, and what it folds to."""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Self

from llmevo import events
from llmevo.errors import RunError
from llmevo.trial import Candidate, Trial

LOG = "events.jsonl"


@dataclass
class RunState:
    """What the log says so far. Changes only by `apply`; the live run and every reader share this."""

    started: events.RunStarted | None = None
    prompted: list[events.Prompted] = field(default_factory=list[events.Prompted])
    candidates: dict[int, Candidate] = field(default_factory=dict[int, Candidate])
    recipes: dict[int, dict[str, object]] = field(default_factory=dict[int, dict[str, object]])
    trials: dict[int, Trial] = field(default_factory=dict[int, Trial])
    told: list[events.Told] = field(default_factory=list[events.Told])
    heldout: dict[str, events.HeldOut] = field(default_factory=dict[str, events.HeldOut])
    finished: events.RunFinished | None = None
    latest: datetime | None = None
    """When the last event was written."""

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
            case events.Prompted():
                self.prompted.append(event)
            case events.Asked():
                self.candidates |= {candidate.id: candidate for candidate in event.read()}
                self.recipes |= {candidate["id"]: candidate["recipe"] for candidate in event.candidates}
            case events.Evaluated():
                candidate = self.candidates[event.candidate]
                self.trials[candidate.id] = Trial(candidate, event.read(), seconds=event.seconds)
            case events.Failed():
                candidate = self.candidates[event.candidate]
                self.trials[candidate.id] = Trial(candidate, None, event.reason, event.seconds)
            case events.Told():
                self.told.append(event)
            case events.HeldOut():
                self.heldout[event.row] = event
            case events.RunFinished():
                self.finished = event

    @property
    def best(self) -> Trial | None:
        """The trial with the highest score; the earlier one of equals."""
        scored = [trial for trial in self.trials.values() if trial.score]
        return max(scored, key=lambda trial: trial.value, default=None)

    @property
    def best_parent(self) -> Trial | None:
        parents = [t for t in self.trials.values() if t.score and t.candidate.origin == "parent"]
        return max(parents, key=lambda trial: trial.value, default=None)


class RunLog:
    """The log of one run, open for appending by one process.

    Every line is written and synced before `append` returns, so what a run has paid for is never lost.
    """

    def __init__(self, folder: Path, resume: bool = False) -> None:
        """Raises RunError when the folder holds another run, when there is none to resume, or when it is in use."""
        self.folder, self.file = folder, folder / LOG
        if not resume:
            check_free(folder)
        if resume and not self.file.exists():
            raise RunError(f"{folder} holds no run (there is no {LOG}); start one with `llmevo run CONFIG`")
        folder.mkdir(parents=True, exist_ok=True)
        self._stream = self.file.open("r+b" if resume else "xb")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._stream.close()
            raise RunError(f"{folder} is being written by another process; wait for it, or stop it") from None
        try:
            self.recorded = [*_read(self._stream, self.file)] if resume else []
        except RunError:
            self._stream.close()
            raise

    def append(self, event: events.Event) -> None:
        line = event.model_dump_json(by_alias=True) + "\n"
        self._stream.write(line.encode())
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def write(self, name: str, text: str) -> None:
        """A file beside the log, replaced as a whole or not at all."""
        write_whole(self.folder / name, text.encode())

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_whole(file: Path, content: bytes) -> None:
    """Replace a file as a whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}-", delete=False) as partial:
        partial.write(content)
        partial.flush()
        os.fsync(partial.fileno())
    Path(partial.name).chmod(0o644)
    Path(partial.name).replace(file)


def check_free(folder: Path) -> None:
    """Raise RunError when the folder holds a run."""
    if (folder / LOG).exists():
        raise RunError(f"{folder} holds a run already; go on with `llmevo resume {folder}`, or choose another --out")


def read_log(run: Path) -> list[events.Event]:
    """The events of a run's folder, for readers. A line still being written is left out."""
    file = run / LOG if run.is_dir() else run
    if not file.exists():
        raise RunError(f"{run} holds no run (there is no {LOG})")
    with file.open("rb") as stream:
        return [*_read(stream, file, cut=False)]


def _read(stream: IO[bytes], file: Path, cut: bool = True) -> Iterator[events.Event]:
    """The events of an open log, which is left at its end.

    A last line without its newline was torn by a crash: with `cut` it is removed, never appended to.
    """
    content = stream.read()
    whole = content.rfind(b"\n") + 1
    if cut and whole < len(content):
        stream.seek(whole)
        stream.truncate()
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        yield _event(line, f"{file}:{number}")


def _event(line: bytes, place: str) -> events.Event:
    try:
        raw = json.loads(line)
        if raw.get("schema", 0) > events.SCHEMA:
            raise RunError(f"{place}: was written by a newer llmevo (schema {raw['schema']}); update llmevo to read it")
        return events.EVENTS.validate_python(raw)
    except (ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{place}: is no event of llmevo ({reason}); the log has been changed by hand") from error
