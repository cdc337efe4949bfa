"""Notation of numbers and times, and the texts of others without control characters."""

import re
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:  # numpy is not needed for a line of text
    from llmevo.search.objectives.objective import Objective

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters except tab and newline, and those that change the direction of writing: in a terminal, texts of
models, servers and logs could move the cursor with them, change what it shows, or reach the clipboard."""


def printable(value: Any) -> Any:
    """Return plain values, lists and mappings of them without unsafe characters in any text."""
    if isinstance(value, str):
        return UNSAFE.sub("", value)
    if isinstance(value, dict):
        return {printable(key): printable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [printable(entry) for entry in value]
    return value


def with_error(value: float | None, stderr: float | None, sign: str = "") -> str:
    """Return a value with its standard error, as far as they are known; `sign` may be `+`."""
    if value is None:
        return ""
    return f"{value:{sign}.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")


def size(value: float, name: str) -> str:
    """Return a layer path's size: `layers`, `parameters` (in millions), or `time`, a share of the first model's."""
    return {"layers": f"{value:.0f}", "parameters": f"{value / 1e6:,.1f} M"}.get(name, f"{value:.3f}")


def objective_value(objective: "Objective", name: str, value: float | None, stderr: float | None) -> str:
    """Return the value of one of several objectives: a size, or a task's metric with its standard error."""
    if value is not None and objective.is_size(name):
        return size(value, name)
    return with_error(value, stderr)


def clock(seconds: float) -> str:
    """Return a time span as `4:05` or `1:04:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def say(console: Console, line: str, style: str = "") -> None:
    """Print a line to the letter: nothing in it is markup, a number to colour, or wrapped."""
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
