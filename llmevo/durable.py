"""Files that are on the disk as a whole or not at all, also after a power cut."""

import os
from pathlib import Path


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
