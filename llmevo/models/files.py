"""Files: the cache folder, files that are written as a whole or not at all, and checksums.

A checksum is remembered in `checksums.json` in the cache folder, by the file's path. It is used while the file's size,
times of change and inode are those of when it was read. Where the cache cannot be written, every process reads the
files again.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmevo.errors import SourceError

PARTIAL = ".llmevo-partial"
"""The end of the names of folders that are being written."""

WHOLE = "sha256:"
"""The prefix of a checksum of whole files. Checksums of version 0.1 have none: they read the first and last MiB."""

THREADS = 8
"""Files that are read at a time. SHA-256 takes one core for each."""

REMEMBERED = 4096
"""The number of files, the latest, whose checksums are remembered."""

WRITTEN_EVERY = 5.0
"""Seconds of reading after which the checksums so far are remembered: a process that is killed has not read in vain."""

END = 1 << 20


def cache_folder() -> Path:
    """Return the folder of converted models and checksums: `$LLMEVO_HOME`, or `llmevo` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LLMEVO_HOME") or Path(cache) / "llmevo")


def kept_file(place: str, name: str, content: bytes) -> Path:
    """Return a file of the cache folder, in its folder `place`, which is written where it is missing. Raises
    SourceError.
    """
    file = cache_folder() / place / name
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, content)
    except OSError as error:
        raise SourceError(
            f"{file} cannot be written ({error.strerror or error}); make room in the cache folder, or set LLMEVO_HOME"
            " to another one"
        ) from error
    return file


def write_whole(file: Path, content: bytes) -> None:
    """Replace a file as a whole or not at all, also at a power cut."""
    # Of several processes that write the same file each has a part of its own.
    partial = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync(place: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def partial_folder(out: Path) -> Generator[Path]:
    """Yield a hidden folder next to `out`, to be renamed to it once it is complete; a folder not renamed is removed.

    It is locked while this process lives. Folders that killed processes left next to `out` are removed first. Raises
    OSError.
    """
    remove_abandoned(out)
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=PARTIAL, dir=out.parent))
        descriptor = os.open(partial, os.O_RDONLY)
        _try_lock(descriptor)
        if partial.exists():  # or another process has removed it as abandoned before it was locked
            break
        os.close(descriptor)
    try:
        yield partial
    finally:
        if partial.exists():
            shutil.rmtree(partial)
        os.close(descriptor)  # not earlier: another process would take the folder for abandoned and remove it as well


def rename_once(partial: Path, out: Path) -> None:
    """Rename a folder to a name that tells its content, unless another process has just made an equal one."""
    try:
        partial.rename(out)
    except OSError:
        if not out.exists():
            raise


def remove_abandoned(out: Path) -> None:
    """Remove the partial folders next to `out`, of any name, whose processes no longer live."""
    begun = re.compile(r"\..+-\w{8}" + re.escape(PARTIAL))
    for folder in [place for place in out.parent.iterdir() if begun.fullmatch(place.name)]:
        with suppress(OSError):  # of another user, or just gone
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                if _try_lock(descriptor):
                    shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Return whether the lock is this process's now; False on a file system without locks, so nothing is removed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold a folder's lock, which one process of the machine has at a time; the others wait.

    A folder that does not exist is made. On a file system without locks nothing is locked. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def content_checksums(files: Iterable[Path]) -> dict[Path, str]:
    """Return the SHA-256 of each file's content. Raises OSError for one that cannot be read."""
    wanted = [*dict.fromkeys(files)]
    known = _read_cache()
    stamps = {file: _stamp(file) for file in wanted}
    found = {file: known[_key(file)]["sha256"] for file in wanted if _is_current(known, file, stamps[file])}
    unread = [file for file in wanted if file not in found]
    if not unread:
        return found
    new, written = dict[str, Any](), time.monotonic()
    with ThreadPoolExecutor(min(THREADS, len(unread), os.cpu_count() or 1)) as pool:
        reading = {pool.submit(read_sha256, file): file for file in unread}
        try:
            for done in as_completed(reading):
                file = reading[done]
                found[file] = done.result()
                if _stamp(file) == stamps[file]:  # else it was written to meanwhile, and is read again the next time
                    new[_key(file)] = {"stamp": stamps[file], "sha256": found[file]}
                if time.monotonic() - written >= WRITTEN_EVERY:
                    _write_cache({**_read_cache(), **new})
                    written = time.monotonic()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            _write_cache({**_read_cache(), **new})
    return found


def unread_bytes(files: Iterable[Path]) -> int:
    """Return how many bytes `content_checksums` would read."""
    known = _read_cache()
    return sum(file.stat().st_size for file in {*files} if not _is_current(known, file, _stamp(file)))


def ends_checksum(file: Path) -> str:
    """Return the checksum of version 0.1: of a file's length and its first and last MiB."""
    length = file.stat().st_size
    with file.open("rb") as content:
        head = content.read(END)
        content.seek(max(0, length - END))
        return hashlib.sha256(f"{length}".encode() + head + content.read(END)).hexdigest()


def read_sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content; reads it."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _key(file: Path) -> str:
    return str(file.resolve())


def _stamp(file: Path) -> list[int]:
    """Return numbers that change with every change of a file."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _is_current(known: Mapping[str, Any], file: Path, stamp: list[int]) -> bool:
    entry = known.get(_key(file))
    return isinstance(entry, dict) and entry.get("stamp") == stamp and isinstance(entry.get("sha256"), str)


def _read_cache() -> dict[str, Any]:
    try:
        known: Any = json.loads((cache_folder() / "checksums.json").read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_cache(known: Mapping[str, Any]) -> None:
    """Replace the cache as a whole. Of processes that do so at a time one wins; the others read their files again."""
    file = cache_folder() / "checksums.json"
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".checksums-{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(dict([*known.items()][-REMEMBERED:])))
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
