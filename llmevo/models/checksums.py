"""Checksums of files: of all their content, read once and remembered as long as a file is unchanged.

A remembered checksum belongs to a path, and is used while the file's size, times of change and inode are those of when
it was read. It lies in `checksums.json` in the cache folder (see `references.cache_folder`); where that cannot be
written, every process reads the files again.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmevo.models.references import cache_folder

WHOLE = "sha256:"
"""What a checksum of the whole content begins with. Those of logs of version 0.1 have no prefix: they are of the first
and the last MiB of every file."""

THREADS = 8
"""Files that are read at a time. SHA-256 takes one core for each."""

KEPT = 4096
"""Files that are remembered, the latest."""

END = 1 << 20


def of_contents(files: Iterable[Path]) -> dict[Path, str]:
    """The SHA-256 of each file's content. Raises OSError for one that cannot be read."""
    wanted = [*dict.fromkeys(files)]
    known = _read_cache()
    stamps = {file: _stamp(file) for file in wanted}
    found = {file: known[key(file)]["sha256"] for file in wanted if _is_current(known, file, stamps[file])}
    unread = [file for file in wanted if file not in found]
    if not unread:
        return found
    with ThreadPoolExecutor(min(THREADS, len(unread), os.cpu_count() or 1)) as pool:
        found |= zip(unread, pool.map(_content, unread), strict=True)
    # A file that was written to while it was read is read again the next time.
    new = {key(f): {"stamp": stamps[f], "sha256": found[f]} for f in unread if _stamp(f) == stamps[f]}
    _write_cache({**_read_cache(), **new})
    return found


def unread_bytes(files: Iterable[Path]) -> int:
    """How much `of_contents` would have to read."""
    known = _read_cache()
    return sum(file.stat().st_size for file in {*files} if not _is_current(known, file, _stamp(file)))


def of_ends(file: Path) -> str:
    """The checksum of version 0.1: of a file's length and its first and last MiB."""
    length = file.stat().st_size
    with file.open("rb") as content:
        head = content.read(END)
        content.seek(max(0, length - END))
        return hashlib.sha256(f"{length}".encode() + head + content.read(END)).hexdigest()


def _content(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def key(file: Path) -> str:
    """What a file is remembered by: its path without links."""
    return str(file.resolve())


def _stamp(file: Path) -> list[int]:
    """What changes with every change of a file."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _is_current(known: Mapping[str, Any], file: Path, stamp: list[int]) -> bool:
    entry = known.get(key(file))
    return isinstance(entry, dict) and entry.get("stamp") == stamp and isinstance(entry.get("sha256"), str)


def _cache() -> Path:
    return cache_folder() / "checksums.json"


def _read_cache() -> dict[str, Any]:
    try:
        known: Any = json.loads(_cache().read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_cache(known: Mapping[str, Any]) -> None:
    """Replace the cache as a whole. Of processes that do so at a time one wins; the others read their files again."""
    with suppress(OSError):
        _cache().parent.mkdir(parents=True, exist_ok=True)
        partial = _cache().with_name(f".checksums-{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps(dict([*known.items()][-KEPT:])))
            partial.replace(_cache())
        finally:
            partial.unlink(missing_ok=True)
