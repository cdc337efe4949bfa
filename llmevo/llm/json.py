"""JSON objects and numbers in any text, in bounded time."""

import json
import math
from collections.abc import Iterator
from typing import Any


def writable(text: str) -> str:
    """Replace lone surrogates, which JSON may have as escapes and no log can hold."""
    return text.encode(errors="replace").decode()


LONGEST = 200_000
"""Characters at the end of an answer that are read: the actual answer comes last."""

STARTS = 2000
"""The most braces that begin no object, after which the rest is noise: each costs a pass through the text."""


def objects(text: str) -> list[dict[str, Any]]:
    """Return the complete JSON objects of a text, in their order: after thoughts, in fences or bare.

    Of an object that was cut off, the complete ones inside it are returned.
    """
    text = text[-LONGEST:]
    after = text.rpartition("</think>")[2]
    found = _objects(after)
    return found if found or after is text else _objects(text)


def _objects(text: str) -> list[dict[str, Any]]:
    decoder = json.JSONDecoder()
    found: list[dict[str, Any]] = []
    place, left = text.find("{"), STARTS
    while place >= 0 and left:
        try:
            value, end = decoder.raw_decode(text, place)
        except RecursionError:  # nested thousands deep: noise
            return found
        except ValueError:
            left -= 1
            place = text.find("{", place + 1)
            continue
        if isinstance(value, dict):
            found.append(value)
        place = text.find("{", end)
    return found


def scalars(value: Any) -> Iterator[Any]:
    """Yield the scalars in nested lists and objects."""
    if isinstance(value, list):
        for entry in value:
            yield from scalars(entry)
    elif isinstance(value, dict):
        yield from scalars([*value.values()])
    else:
        yield value


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
