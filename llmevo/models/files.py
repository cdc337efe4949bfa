"""Files that are on the disk as a whole or not at all, also after a power cut."""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".llmevo-partial"
"""What the names of folders end with that are being written."""


def write_whole(file: Path, content: bytes) -> None:
    """Replace a file as a whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")  # one name: what a crash leaves is overwritten
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


def sync_tree(folder: Path) -> None:
    """The same for a folder and all that is in it."""
    for place in (*folder.rglob("*"), folder):
        sync(place)


@contextmanager
def partial_folder(out: Path) -> Generator[Path]:
    """A hidden folder beside `out`, to be renamed to it once it is whole; removed at the end if it still is there.

    It is locked as long as this process lives. Those that killed processes have left beside `out` are removed first.
    Raises OSError.
    """
    remove_abandoned(out)
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=PARTIAL, dir=out.parent))
        descriptor = os.open(partial, os.O_RDONLY)
        _try_lock(descriptor)
        if partial.exists():  # or another process has taken it for abandoned before it was locked
            break
        os.close(descriptor)
    try:
        yield partial
    finally:
        if partial.exists():
            shutil.rmtree(partial)
        os.close(descriptor)  # not earlier: another process would take the folder for abandoned and remove it as well


def remove_abandoned(out: Path) -> None:
    """Remove what processes that no longer live have begun to write in the folder of `out`, under whatever name."""
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
    """Whether the lock is this process's now. Never on a file system without locks: there nothing is removed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
