"""JSON objects and numbers in any text, in bounded time."""

import json
import math
from collections.abc import Iterator
from typing import Any


def without_surrogates(text: str) -> str:
    """Replace lone surrogates, which JSON may have as escapes and no log can hold."""
    return text.encode(errors="replace").decode()


LONGEST = 200_000
"""Characters at the end of an answer that are read: the actual answer comes last."""

STARTS = 2000
"""The most braces that begin no object, after which the rest is noise: each costs a pass through the text."""

DEEPEST = 400
"""Levels from which on an object is noise. Python's own limit is higher, but depends on the version and the caller."""


def objects(text: str) -> list[dict[str, Any]]:
    """Return the complete JSON objects of a text, in their order: after thoughts, in fences or bare.

    Of an object that was cut off, the complete ones inside it are returned.
    """
    text = text[-LONGEST:]
    after = without_thoughts(text)
    found = _objects(after)
    return found if found or after is text else _objects(text)


def without_thoughts(text: str) -> str:
    """Return what follows the thoughts of a reasoning model; nothing where they were cut off."""
    _, end, after = text.rpartition("</think>")
    return after if end or not text.lstrip().startswith("<think>") else ""


def _objects(text: str) -> list[dict[str, Any]]:
    decoder = json.JSONDecoder()
    found: list[dict[str, Any]] = []
    place, left = text.find("{"), STARTS
    while place >= 0 and left:
        try:
            value, end = decoder.raw_decode(text, place)
        except RecursionError:  # noise, as below
            return found
        except ValueError:
            left -= 1
            place = text.find("{", place + 1)
            continue
        if _is_deep(value):
            return found
        if isinstance(value, dict):
            found.append(value)
        place = text.find("{", end)
    return found


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested `DEEPEST` levels deep or more."""
    level = [value]
    for _ in range(DEEPEST):
        nested = [of for of in level if isinstance(of, list | dict)]
        level = [inner for of in nested for inner in (of.values() if isinstance(of, dict) else of)]
        if not level:
            return False
    return True


def scalars(value: Any) -> Iterator[Any]:
    """Yield the scalars in nested lists and objects."""
    waiting = [value]
    while waiting:
        first = waiting.pop()
        if isinstance(first, dict):
            first = [*first.values()]
        if isinstance(first, list):
            waiting += reversed(first)
        else:
            yield first


def numeral(value: Any) -> float:
    """Return a number, also of a numeral in a string. Raises ValueError for anything else."""
    if isinstance(value, bool) or value is None:
        raise ValueError(f"{value!r} is not a number")
    try:
        number = float(value)  # raises ValueError for prose
    except (OverflowError, TypeError):
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{str(value)[:20]} is not finite")
    return number
