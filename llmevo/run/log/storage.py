"""The run folder with its append-only log; `RunState` is the fold of the log."""

import errno
import fcntl
import hashlib
import json
import os
import re
import time
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from llmevo.errors import LogError, RunError, quoted
from llmevo.models.files import sync, write_whole
from llmevo.run.log import events

LOG = "events.jsonl"
BEST = "best.yml"
"""The best recipe so far, in a run's folder."""
ROUTING = "routing.json"
"""In the folder of a finished search over mixtures: which expert answers which task, in which layer."""

NAN_TEXT = re.compile(rb'"\s*[+-]?(nan|inf|infinity)\s*"', re.IGNORECASE)
"""A string that pydantic reads as a number that JSON does not have."""

WRITTEN = ("config.yml", BEST)
"""Files that a run writes beside its log."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk."""

DECIDING = (events.RunStarted, events.Resumed)
"""The events that decide what a run executes, opens and contacts."""

PATIENCE = 0.5
"""Seconds to wait for a locked log: `llmevo status` and `watch` lock it for a moment."""


class RunLog:
    """The log of one run, open for appending by one process. Every line is synced before `append` returns."""

    def __init__(self, folder: Path, resume: bool = False) -> None:
        """Raises RunError when the folder holds another run, holds none to resume, or is in use, and LogError when it
        cannot be written.
        """
        self.folder, self.file = folder, folder / LOG
        self.place = folder.absolute()
        """The absolute path: the working directory may change."""
        if not resume:
            check_free(folder)
        else:
            check_folder(folder)
            if not self.file.exists():
                raise RunError(f"{folder} holds no run (there is no {LOG}); start one with `llmevo run CONFIG`")
        with _errors(self.file, begun=resume):
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        _OPEN.add(self)
        try:
            _lock(self._descriptor, folder)
            if not resume:  # another process may have started one before the lock
                check_free(folder)
            content = self.file.read_bytes()
            self.recorded = [*_events(content, self.file)]
            self._size = _whole(content)
            with _errors(self.file, begun=bool(self.recorded)):
                os.truncate(self._descriptor, self._size)
                os.lseek(self._descriptor, self._size, os.SEEK_SET)
                sync(folder)  # a new file survives a power cut once its folder is synced
        except BaseException:
            self.close()
            raise

    def append(self, event: events.Event) -> None:
        """Raises LogError when the disk is full or fails, and when the log is gone; the log is then as before."""
        self._check_there()
        line = (event.model_dump_json(by_alias=True) + "\n").encode()
        if isinstance(event, DECIDING):
            mark([line])
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
        """Cut off a partly written line. If that fails too, the next process that opens the log does it."""
        with suppress(OSError):
            os.truncate(self._descriptor, self._size)
            os.lseek(self._descriptor, self._size, os.SEEK_SET)

    def write(self, name: str, text: str) -> None:
        """Replace a file beside the log, as a whole or not at all. Raises LogError."""
        self._check_there()
        with _errors(self.folder / name, begun=self._size > 0):
            write_whole(self.place / name, text.encode())

    @property
    def missing(self) -> str:
        """An error text when the folder was moved or deleted meanwhile; empty while it is there."""
        own = os.fstat(self._descriptor)
        with suppress(OSError):
            if os.path.samestat(own, (self.place / LOG).stat()):
                return ""
        if own.st_nlink:
            return (
                f"{self.folder} was moved while the run went on. Nothing that was scored is lost: `llmevo resume` goes"
                " on at its new place"
            )
        return (
            f"{self.file} was deleted while the run went on, and all that it held is lost; begin anew with"
            " `llmevo run CONFIG`"
        )

    def _check_there(self) -> None:
        if missing := self.missing:
            raise LogError(missing)

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
    """Close the logs in a child process, which would hold their locks after this one ends."""
    for log in _OPEN:
        log.close()


os.register_at_fork(after_in_child=_close_inherited)


def _lock(descriptor: int, folder: Path) -> None:
    """Raises RunError when another process holds the log."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise RunError(
                    f"{folder} cannot be locked against a second process ({error.strerror}), for its file system has no"
                    " locks, or none now; choose a folder on another disk with --out, or move the run there"
                ) from error
            if time.monotonic() > until:
                raise RunError(f"{folder} is being written by another process; wait for it, or stop it") from None
            time.sleep(PATIENCE / 10)
        else:
            return


@contextmanager
def _errors(file: Path, begun: bool) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise _failure(file, error, begun) from error


def _failure(file: Path, error: OSError, begun: bool = True) -> LogError:
    """Explain an error of the disk; `begun`: whether there is a run to resume."""
    what = "disk full: " if error.errno in FULL else "the disk fails: " if error.errno == errno.EIO else ""
    then = (
        f"Nothing that was scored is lost: once that is solved, `llmevo resume {quoted(file.parent)}` goes on"
        if begun
        else "No run was begun; choose another folder with --out, or make this one writable"
    )
    return LogError(f"{what}{file} cannot be written ({error.strerror}). {then}")


def is_own(run: Path) -> bool:
    """Whether this user started the log on this machine, or trusted it before: `mark` has noted every line of its
    `DECIDING` events, to the letter. A log cannot claim that by itself.
    """
    file = run / LOG if run.is_dir() else run
    try:
        lines, known = _deciding(file.read_bytes(), file), _notes().read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return False
    return bool(lines) and {*map(_digest, lines)} <= {*known}


def trust(run: Path) -> None:
    """Treat a log from elsewhere as this user's own from now on; see `is_own`."""
    file = run / LOG if run.is_dir() else run
    mark(_deciding(file.read_bytes(), file))


def mark(lines: Iterable[bytes]) -> None:
    """Note the digests of lines of a log in `$XDG_STATE_HOME/llmevo/logs` (~/.local/state by default), which only this
    user can write. If it cannot be written, a later `resume` needs `--trust`, as for a foreign log.
    """
    file = _notes()
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, "".join(f"{_digest(line)}\n" for line in lines).encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _notes() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "llmevo" / "logs"


def _digest(line: bytes) -> str:
    return hashlib.sha256(line.rstrip(b"\n")).hexdigest()


def _deciding(content: bytes, file: Path) -> list[bytes]:
    """Return the lines of the `DECIDING` events."""
    lines = content[: _whole(content)].splitlines()
    return [line for line, event in zip(lines, _events(content, file), strict=True) if isinstance(event, DECIDING)]


def holds_run(folder: Path) -> bool:
    """Whether the folder has a log with at least one whole line."""
    file = folder / LOG
    return file.exists() and b"\n" in file.read_bytes()


def check_folder(place: Path) -> None:
    """Raise RunError for the log of a run in place of its folder."""
    if place.name == LOG and place.is_file():
        raise RunError(f"{place} is the log of a run; give its folder, {place.parent}")


def check_free(folder: Path) -> None:
    """Raise RunError where the place is no folder, and when the folder holds a run, a model, or files that a run would
    overwrite; LogError for a name that no folder can have.
    """
    with _errors(folder / LOG, begun=False):
        file = next((place for place in (folder, *folder.parents) if place.is_file()), None)
    if file:
        raise RunError(f"{folder} is no place for a run: {file} is a file; choose another --out")
    if (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        raise RunError(f"{folder} holds a model; choose another --out for the run")
    if holds_run(folder):
        resume = f"llmevo resume {quoted(folder)}"
        raise RunError(f"{folder} holds a run already; go on with `{resume}`, or choose another --out")
    taken = [] if (folder / LOG).exists() else [name for name in WRITTEN if (folder / name).exists()]
    if taken:
        raise RunError(
            f"{folder} holds no run, but a file {taken[0]} that a run would overwrite; choose another --out, or move"
            " the file"
        )


def read_log(run: Path) -> list[events.Event]:
    """Return the events of a run's folder, without a line that is still being written."""
    file = run / LOG if run.is_dir() else run
    if not file.exists():
        raise RunError(f"{run} holds no run (there is no {LOG})")
    with readable(file):
        content = file.read_bytes()
    return [*_events(content, file)]


@contextmanager
def readable(file: Path) -> Generator[None]:
    """Raise RunError for a log that cannot be read."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{file} cannot be read ({reason}); make it readable, or give another folder") from error


@contextmanager
def consistent_log(run: Path) -> Generator[None]:
    """Raise RunError that names the log of `run` if its events do not fit together, as after an edit by hand."""
    try:
        yield
    except UnicodeError:  # of a terminal
        raise
    except (LookupError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RunError(
            f"{run / LOG if run.is_dir() else run}: its events do not fit together ({reason}); the log has been changed"
            " by hand; `llmevo replay RUN --verify` names the first wrong line"
        ) from error


def _whole(content: bytes) -> int:
    """Return the length of the log's whole lines.

    A last line is torn when it has no newline, or zero bytes: a block that a power cut kept from the disk.
    """
    whole = content.rfind(b"\n") + 1
    before = content.rfind(b"\n", 0, max(0, whole - 1)) + 1
    return before if b"\0" in content[before:whole] else whole


def _events(content: bytes, file: Path) -> Iterator[events.Event]:
    for number, line in enumerate(content[: _whole(content)].splitlines(), start=1):
        yield parse_event(line, f"{file}:{number}")


def parse_event(line: bytes, place: str) -> events.Event:
    """Parse one line of a log. Raises RunError, which names the `place` of the line."""
    try:
        raw = json.loads(line, parse_constant=_refuse_constant)
        if raw.get("schema", 0) > events.SCHEMA:
            raise RunError(f"{place}: was written by a newer llmevo (schema {raw['schema']}); update llmevo to read it")
        event = events.EVENTS.validate_python(raw)
        if NAN_TEXT.search(line):
            _check_finite(event)
        return event
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = _reason(error)
        raise RunError(f"{place}: is no event of llmevo ({reason}); the log has been changed by hand") from error


def _check_finite(event: events.Event) -> None:
    try:
        json.dumps(event.model_dump(mode="json"), allow_nan=False)
    except ValueError:
        raise ValueError("a number is NaN or infinite, which no run writes") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))[:300]
    return str(error).splitlines()[0][:300]


def runs_in(places: Sequence[Path]) -> list[Path]:
    """Return each place itself where it is a run, else the runs in it. Raises RunError for a place without any."""
    found: list[Path] = []
    for place in places:
        if not place.exists():
            raise RunError(f"{place}: there is no such file or folder")
        check_folder(place)
        inside = [place] if (place / LOG).exists() else sorted(file.parent for file in place.glob(f"*/{LOG}"))
        if not inside:
            raise RunError(f"{place} holds no run (there is no {LOG}), and no folder in it does")
        found += inside
    return [*dict.fromkeys(found)]


def shared_folder(runs: Sequence[Path]) -> Path:
    """Return the folder for what is made of several runs: the one that they all lie in, else the working directory; of
    one run its own.
    """
    if len(runs) == 1:
        return runs[0]
    parents = {run.absolute().parent for run in runs}
    return parents.pop() if len(parents) == 1 else Path.cwd()


class Tail:
    """The log of a run that may still be written, read piece by piece."""

    def __init__(self, run: Path) -> None:
        self.file = run / LOG
        self._read, self._lines = 0, 0

    def new(self) -> list[events.Event]:
        """Return the events of the lines that were completed since the last call; those before a line that is no event
        come first.

        Raises RunError for a line that is no event, and for a log that was cut or started anew.
        """
        if not self.file.exists():
            return []
        with self.file.open("rb") as stream:
            size = stream.seek(0, 2)
            if size < self._read:
                raise RunError(f"{self.file} is shorter than it was: another run has begun in its place; watch it anew")
            stream.seek(self._read)
            content = stream.read()
        found: list[events.Event] = []
        for line in content[: _whole(content)].splitlines(keepends=True):
            try:
                found.append(parse_event(line, f"{self.file}:{self._lines + 1}"))
            except RunError:
                if found:
                    break
                raise
            self._lines += 1
            self._read += len(line)
        return found


def is_written(run: Path) -> bool:
    """Whether a live process writes the log of a run: then a shared lock is refused."""
    file = run / LOG
    if not file.exists():
        return False
    with file.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:  # a file system without locks gives another error
            return error.errno == errno.EWOULDBLOCK
    return False


def runs_below(place: Path) -> list[Path]:
    """Return the folder itself where it is a run, else all runs below it, but for those inside of a run. Links are
    followed, each folder once. Raises RunError for a log in place of its folder.
    """
    check_folder(place)
    found: list[Path] = []
    known: set[str] = set()
    for folder, inside, files in os.walk(place, followlinks=True):
        real = os.path.realpath(folder)
        if real in known:
            inside.clear()
            continue
        known.add(real)
        if LOG in files:
            found.append(Path(folder))
            inside.clear()
    return sorted(found)
