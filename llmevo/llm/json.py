"""JSON objects and numbers in any text, in bounded time."""

import json
import math
from collections.abc import Iterator
from typing import Any


def writable(text: str) -> str:
    """Without lone surrogates: JSON may bring them as escapes, and no log can hold them."""
    return text.encode(errors="replace").decode()


LONGEST = 200_000
"""Characters of an answer that are looked at: its end, where the answer proper stands."""

STARTS = 2000
"""Braces that begin no object, until the rest counts as noise: each costs a walk through the text."""


def objects(text: str) -> list[dict[str, Any]]:
    """The complete JSON objects of a text, in their order: after thoughts, in fences or bare.

    Of an object that was cut off, the complete ones inside it.
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
        except RecursionError:  # nested thousands deep: noise, and so is what follows
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
    """What stands in nested lists and objects."""
    if isinstance(value, list):
        for entry in value:
            yield from scalars(entry)
    elif isinstance(value, dict):
        yield from scalars([*value.values()])
    else:
        yield value


def numeral(value: Any) -> float:
    """A number, also a numeral in a string. Raises ValueError for anything else."""
    if isinstance(value, bool) or value is None:
        raise ValueError(f"{value!r} is not a number")
    try:
        number = float(value)  # raises ValueError for prose
    except (OverflowError, TypeError):
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{str(value)[:20]} is not finite")
    return number
