"""Single steps of a merge on one block of a tensor, compiled by Numba; arithmetic is float32.

Every array is flat and small enough to stay in the processor's cache. bfloat16 weights come as their bits (uint16).
No fused or reordered arithmetic: the same inputs give the same bits on any machine. (`fused.py` has the loops that do
all steps of the common methods in one pass.)
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

Stored = NDArray[np.uint16] | Floats
"""Weights as they are stored: the bits of bfloat16, or float32."""

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compiled at the first call and kept on disk; the interpreter is free while it runs."""
    decorate: Any = numba.njit(nogil=True, cache=True, error_model="numpy")  # pyright: ignore[reportUnknownMemberType]
    return cast("Function", decorate(function))


@compiled
def _widen_bits(source: NDArray[np.uint16], out: Floats) -> None:
    bits = out.view(np.uint32)
    for i in range(len(source)):
        bits[i] = np.uint32(source[i]) << np.uint32(16)


@compiled
def narrow_bits(source: Floats, out: NDArray[np.uint16]) -> None:
    """float32 rounded to the bits of bfloat16: to the nearest, ties to even. Rounds in `source`, which is used up."""
    bits = source.view(np.uint32)
    for i in range(len(source)):
        odd = np.uint32(bits[i] >> np.uint32(16)) & np.uint32(1)
        rounded = np.uint32(bits[i] + np.uint32(0x7FFF) + odd)
        # A NaN must not carry over into the sign.
        number = np.uint32(bits[i] & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000)
        bits[i] = rounded if number else np.uint32(0x7FC00000)
    for i in range(len(source)):
        out[i] = np.uint16(np.uint32(bits[i] >> np.uint32(16)))


def widen(source: Stored, out: Floats) -> None:
    """Stored weights as float32."""
    if source.dtype == np.uint16:
        _widen_bits(cast("NDArray[np.uint16]", source), out)
    else:
        out[:] = source


def narrow(source: Floats, out: Stored) -> None:
    """float32 rounded once to how the result is stored; `source` is used up."""
    if out.dtype == np.uint16:
        narrow_bits(source, cast("NDArray[np.uint16]", out))
    else:
        out[:] = source


@compiled
def subtract(origin: Floats, row: Floats) -> None:
    """row - origin, in place: weights become a task vector."""
    for i in range(len(row)):
        row[i] -= origin[i]


@compiled
def keep_window(row: Floats, low: np.uint32, high: np.uint32) -> None:
    """Zero the entries whose magnitude, as bits, is not from `low` to below `high`."""
    bits = row.view(np.uint32)
    for i in range(len(row)):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        row[i] = row[i] if (magnitude >= low) & (magnitude < high) else np.float32(0)


LANES = 256
"""Sums that are kept side by side: a fixed order of additions, and one that the processor can do many at a time of."""


@compiled
def absolute_sum(row: Floats) -> float:
    """Σ|x| of a block, in an order of additions that is the same everywhere."""
    lanes = np.zeros(LANES, np.float32)
    whole = len(row) // LANES
    for i in range(whole):
        part = row[i * LANES : (i + 1) * LANES]
        for lane in range(LANES):
            lanes[lane] += abs(part[lane])
    total = np.float64(0)
    for i in range(whole * LANES, len(row)):
        total += abs(np.float64(row[i]))
    for lane in range(LANES):
        total += np.float64(lanes[lane])
    return total


@compiled
def inner(one: Floats, other: Floats) -> float:
    """Σ xᵢyᵢ in float64, in an order of additions that is the same everywhere."""
    lanes = np.zeros(LANES, np.float64)
    whole = len(one) // LANES
    for i in range(whole):
        first, second = one[i * LANES : (i + 1) * LANES], other[i * LANES : (i + 1) * LANES]
        for lane in range(LANES):
            lanes[lane] += np.float64(first[lane]) * np.float64(second[lane])
    total = np.float64(0)
    for i in range(whole * LANES, len(one)):
        total += np.float64(one[i]) * np.float64(other[i])
    for lane in range(LANES):
        total += lanes[lane]
    return total
