"""Names of tasks in task files, read as text.

lm-eval's index of its own tasks takes ten seconds: it parses fourteen thousand YAML files. To search them as text takes
under one, and does not import lm-eval.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llmevo.errors import TaskError, nearest

SUFFIX = "_train"
"""At the end of a task's name: the task on the questions of its training split; see `training_split`."""


IGNORED = {"__pycache__", ".ipynb_checkpoints"}
"""Folders that lm-eval passes over."""


NAME = re.compile(rb"""(?:^|[{,])[\s-]*["']?(?:task|group|tag)["']?\s*:\s*["']?([^\s"'#\[\]{},]+)""", re.MULTILINE)
"""What a task file calls its task, group or tag. It misses a few, so it serves for suggestions only."""


def check_names(names: Mapping[str, str], search_path: Sequence[Path]) -> None:
    """Find a misspelt task without lm-eval's index.

    `names` are the tasks, each with the key of the config that lists it. Raises TaskError for one that stands in no
    task file of the search path nor of lm-eval, with the nearest name, and for a folder that does not exist. A name
    that stands somewhere in a file may still be none of a task: the index decides.
    """
    for folder in search_path:
        if not folder.is_dir():
            raise TaskError(f"task_search_path: there is no folder {folder}")
    # Names that are not ASCII may be written with escapes: they are left to the index.
    missing = {name: _pattern(name) for name in names if name.isascii()}
    own: dict[str, None] = {}
    known: dict[str, None] = {}
    for folder in (*search_path, *_built_in()):
        for _, content in _contents(folder):
            for name in [name for name, pattern in missing.items() if pattern.search(content)]:
                del missing[name]
            if not missing:
                return
            found = dict.fromkeys(name.decode(errors="replace") for name in NAME.findall(content))
            (own if folder in search_path else known).update(found)
    for name in missing:
        hint = nearest(name, own)  # before lm-eval's, of which some are like every name
        hint = hint if hint.startswith(", did") else nearest_task(name, [*known])
        raise TaskError(f"{names[name]}: there is no task {name!r}{hint}")


def files_of(name: str, folder: Path) -> list[Path]:
    """The files of a folder that seem to describe a task, group or tag of this name."""
    words = {name.encode(), name.removesuffix(SUFFIX).encode()}
    return [file for file, content in _contents(folder) if words.intersection(NAME.findall(content))]


def nearest_task(name: str, known: Sequence[str]) -> str:
    """The hint for a misspelt task; lm-eval has too many to list."""
    hint = nearest(name, known)
    return hint if hint.startswith(", did") else "; `llmevo tasks` lists them, task_search_path adds your own"


def _pattern(name: str) -> re.Pattern[bytes]:
    """The name, or the one of the task whose training split it means, as a word of its own."""
    words = {name, name.removesuffix(SUFFIX)} - {""}
    return re.compile(rb"(?<!\w)(?:" + b"|".join(re.escape(word.encode()) for word in words) + rb")(?!\w)")


def _built_in() -> list[Path]:
    """The folder of lm-eval's own tasks."""
    spec = importlib.util.find_spec("lm_eval")
    return [Path(place) / "tasks" for place in (spec.submodule_search_locations if spec else None) or []]


def _contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every task file of a folder, and what it says."""
    for file in folder.glob("**/*.yaml"):
        if IGNORED.isdisjoint(file.parts):
            try:
                yield file, file.read_bytes()
            except OSError:
                continue
