"""The compiled loops of the merge methods, in Numba; all arithmetic is float32.

A loop of the common methods works on entries `start` to `stop` of one tensor, in blocks that stay in the processor's
cache from reading to rounding. Models come as a table of `MODEL` records, so that one compiled loop serves any number
of models in any storage type; bfloat16 weights are read as their bits (uint16). There is no fused or reordered
arithmetic: the same inputs give the same bits on every machine and with any number of threads.

Numba keeps a compiled function until the function's own file changes: loops that call each other are in this file, and
a change of `inner` needs a change of `gram.py` and `sce.py`.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba import extending
from numba.core import cgutils
from numba.core import types as numba_types
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Stored = NDArray[np.uint16] | Floats
"""Weights as they are stored: the bits of bfloat16, or float32."""

Function = TypeVar("Function", bound=Callable[..., Any])
BLOCK = 1 << 11
"""Entries of a block: a dozen rows of 8 KiB stay in a core's cache."""

SHARES = 10_000
"""Equal parts of the range of random bits: sums for each of them serve all densities in steps of 1/SHARES."""

NO_TENSOR, BFLOAT16, FLOAT32 = 0, 1, 2
"""The storage of a tensor: there is none, the bits of bfloat16, float32."""

KEEP_ALL, KEEP_NONE, KEEP_WINDOW, DROP, DROP_BY_RANK = range(5)
"""The kinds of masks: see `MODEL`."""

MODEL = np.dtype(
    [
        ("address", np.uint64),  # where the tensor's memory starts
        ("stored", np.int64),  # NO_TENSOR, BFLOAT16 or FLOAT32
        ("less_base", np.int64),  # whether the base is still to be subtracted
        ("mask", np.int64),  # one of KEEP_ALL … DROP_BY_RANK
        # KEEP_WINDOW: magnitudes, as bits, from `low` to below `high`; of those equal to a bound the first entries
        # of the tensor count as the larger ones, as far as `low_last` and `high_last`.
        ("low", np.int64),
        ("low_last", np.int64),
        ("high", np.int64),
        ("high_last", np.int64),
        # DROP: keep where 32 random bits are below `threshold`; DROP_BY_RANK: with probability lowest + step · rank.
        ("seed", np.uint64),
        ("threshold", np.uint64),
        ("ranks", np.uint64),
        ("wide_ranks", np.int64),
        ("lowest", np.float32),
        ("step", np.float32),
        ("inverse", np.int64),  # divide a kept entry by the probability it was kept with
        ("weight", np.float32),
        ("scale", np.float32),  # what a kept entry is multiplied by: the weight, and the rescaling
    ],
    align=True,
)
"""One model's tensor, the mask of its task vector, and its weight."""

LANES = 256
"""Partial sums that are kept side by side: a fixed order of additions that suits vector instructions."""


def compiled(function: Function) -> Function:
    """Compile at the first call and keep the result on disk; the function runs without the interpreter's lock."""
    decorate: Any = numba.njit(nogil=True, cache=True, error_model="numpy")  # pyright: ignore[reportUnknownMemberType]
    return cast("Function", decorate(function))


@compiled
def _widen_bits(source: NDArray[np.uint16], out: Floats) -> None:
    bits = out.view(np.uint32)
    for i in range(len(source)):
        bits[i] = np.uint32(source[i]) << np.uint32(16)


@compiled
def narrow_bits(source: Floats, out: NDArray[np.uint16]) -> None:
    """Round float32 to the bits of bfloat16: to the nearest, ties to even. Overwrites `source`."""
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
    """Write stored weights as float32."""
    if source.dtype == np.uint16:
        _widen_bits(cast("NDArray[np.uint16]", source), out)
    else:
        out[:] = source


def narrow(source: Floats, out: Stored) -> None:
    """Round float32 once to the type of the result. Overwrites `source`."""
    if out.dtype == np.uint16:
        narrow_bits(source, cast("NDArray[np.uint16]", out))
    else:
        out[:] = source


@compiled
def keep_window(row: Floats, low: np.uint32, high: np.uint32) -> None:
    """Zero the entries whose magnitude, as bits, is not from `low` to below `high`."""
    bits = row.view(np.uint32)
    for i in range(len(row)):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        row[i] = row[i] if (magnitude >= low) & (magnitude < high) else np.float32(0)


@compiled
def absolute_sum(row: Floats) -> float:
    """Return Σ|x| of a block, in an order of additions that is the same everywhere."""
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
    """Return Σ xᵢyᵢ in float64, in an order of additions that is the same everywhere."""
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


intrinsic: Any = extending.intrinsic  # pyright: ignore[reportUnknownMemberType]


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    """Return an address as a pointer, for `numba.carray`."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return numba_types.voidptr(address), generate


@intrinsic
def _float(_context: Any, bits: Any) -> Any:
    """Return the float32 with these bits."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return numba_types.float32(bits), generate


carray: Any = numba.carray  # pyright: ignore[reportUnknownMemberType, reportPrivateImportUsage]


@compiled
def _widen(stored: int, address: np.uint64, start: int, out: Floats) -> None:
    """Write stored weights as float32; zeros where there is no tensor."""
    stop = start + len(out)
    if stored == BFLOAT16:
        _widen_bits(carray(_pointer(address), stop, np.uint16)[start:stop], out)
    elif stored == FLOAT32:
        floats = carray(_pointer(address), stop, np.float32)[start:stop]
        for i in range(len(out)):
            out[i] = floats[i]
    else:
        for i in range(len(out)):
            out[i] = np.float32(0)


@compiled
def _narrow(row: Floats, stored: int, address: np.uint64, start: int) -> None:
    """Round float32 once to the type of the result: to the nearest, ties to even."""
    stop = start + len(row)
    if stored == BFLOAT16:
        narrow_bits(row, carray(_pointer(address), stop, np.uint16)[start:stop])
    else:
        floats = carray(_pointer(address), stop, np.float32)[start:stop]
        for i in range(len(row)):
            floats[i] = row[i]


@compiled
def _read(model: Any, base: Floats, start: int, row: Floats) -> None:
    """Read one model's task vector (or weight, where there is no base) into `row`."""
    _widen(model.stored, model.address, start, row)
    if model.less_base:
        for i in range(len(row)):
            row[i] -= base[i]


@compiled
def _read_first(models: Any, base: Any, start: int, origin: Floats, row: Floats) -> None:
    _widen(base[0].stored, base[0].address, start, origin)
    _read(models[0], origin, start, row)


@compiled
def _add(model: Any, base: Floats, start: int, total: Floats) -> None:
    """Add scale · the model's whole task vector (or weight) to `total`."""
    stop, scale = start + len(total), model.scale
    if model.stored == BFLOAT16 and model.less_base:
        halves = carray(_pointer(model.address), stop, np.uint16)[start:stop]
        for i in range(len(total)):
            total[i] += scale * (_float(np.uint32(np.uint32(halves[i]) << np.uint32(16))) - base[i])
    elif model.stored == BFLOAT16:
        halves = carray(_pointer(model.address), stop, np.uint16)[start:stop]
        for i in range(len(total)):
            total[i] += scale * _float(np.uint32(np.uint32(halves[i]) << np.uint32(16)))
    elif model.less_base:
        floats = carray(_pointer(model.address), stop, np.float32)[start:stop]
        for i in range(len(total)):
            total[i] += scale * (floats[i] - base[i])
    else:
        floats = carray(_pointer(model.address), stop, np.float32)[start:stop]
        for i in range(len(total)):
            total[i] += scale * floats[i]


@compiled
def _split(bound: int, last: int, start: int, size: int) -> tuple[np.uint32, np.uint32, int]:
    """Split a bound with ties: return the bound up to some entry of the block, the bound after it, and that entry."""
    here = min(max(last + 1 - start, 0), size)
    return np.uint32(bound), np.uint32(bound + 1), here


@compiled
def _random_bits(seed: np.uint64, start: int, out: NDArray[np.uint64]) -> None:
    """Write 64 random bits for each counter from `start`: SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195).

    They are a function of seed and counter, so parts of a mask can be made in any order.
    """
    for i in range(len(out)):
        z = seed + np.uint64(start + i + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out[i] = z ^ (z >> np.uint64(31))


@compiled
def _drop_by_rank(row: Floats, bits: NDArray[np.uint32], ranks: Any, model: Any) -> None:
    lowest, step, zero = model.lowest, model.step, np.float32(0)
    if model.inverse:
        for i in range(len(row)):
            row[i] /= lowest + step * np.float32(ranks[i])
    for i in range(len(row)):
        drawn = np.float32(bits[i] >> np.uint32(8)) * np.float32(2.0**-24)
        row[i] = row[i] if drawn < lowest + step * np.float32(ranks[i]) else zero


@compiled
def _mask(model: Any, start: int, row: Floats, words: NDArray[np.uint64]) -> None:
    """Zero the entries of a task vector that its mask drops."""
    size = len(row)
    if model.mask == KEEP_NONE:
        for i in range(size):
            row[i] = np.float32(0)
    elif model.mask == KEEP_WINDOW:
        low, above_low, low_here = _split(model.low, model.low_last, start, size)
        high, above_high, high_here = _split(model.high, model.high_last, start, size)
        first, second = min(low_here, high_here), max(low_here, high_here)
        keep_window(row[:first], low, high)
        if low_here < high_here:
            keep_window(row[first:second], above_low, high)
        else:
            keep_window(row[first:second], low, above_high)
        keep_window(row[second:], above_low, above_high)
    elif model.mask == DROP or model.mask == DROP_BY_RANK:
        _random_bits(model.seed, start // 2, words)
        bits = words.view(np.uint32)[:size]
        if model.mask == DROP:
            below = np.uint32(model.threshold)
            inverse = np.float32(1) / model.lowest if model.inverse else np.float32(1)
            for i in range(size):
                row[i] = row[i] * inverse if bits[i] < below else np.float32(0)
        elif model.wide_ranks:
            wide = carray(_pointer(model.ranks), start + size, np.uint32)[start:]
            _drop_by_rank(row, bits, wide, model)
        else:
            narrow = carray(_pointer(model.ranks), start + size, np.uint16)[start:]
            _drop_by_rank(row, bits, narrow, model)


@compiled
def _elect(rows: Floats, models: Any, sums: Floats, mixed: Floats, shares: Floats) -> None:
    """Sum the entries that agree with the sign of the sum of all rows, and their weights (TIES, Algorithm 1: elect
    final signs, disjoint merge).

    A sum of 0 counts as positive; an entry that is exactly 0 is left out.
    """
    zero, size = np.float32(0), len(sums)
    for i in range(size):
        sums[i] = rows[0, i] + zero  # so that no zero is below zero
        mixed[i] = shares[i] = zero
    for m in range(1, len(rows)):
        row = rows[m, :size]
        for i in range(size):
            sums[i] += row[i]
    signs = sums.view(np.uint32)
    for m in range(len(rows)):
        row, weight = rows[m, :size], models[m].weight
        bits = row.view(np.uint32)
        for i in range(size):
            agrees = ((bits[i] ^ signs[i]) < np.uint32(0x80000000)) & (row[i] != zero)
            mixed[i] += row[i] if agrees else zero
            shares[i] += weight if agrees else zero
    for i in range(size):
        mixed[i] = mixed[i] if sums[i] == sums[i] else sums[i]  # a NaN agrees with nothing, but must stay


@compiled
def combine(
    models: Any, base: Any, out: Any, elected: bool, normalize: bool, factor: float, start: int, stop: int
) -> None:
    """Write out = base + factor · Σ scaleᵢ · masked task vector i, entries `start` to `stop`.

    Without a base the models' weights are summed. With `elected` only entries that agree with the majority's sign are
    summed, and with `normalize` divided by the sum of their weights, unless that is exactly 0, as in mergekit.
    """
    many = len(models)
    rows, more = np.empty((many, BLOCK), np.float32), np.empty((5, BLOCK), np.float32)
    words = np.empty(BLOCK // 2, np.uint64)
    times = np.float32(factor)
    for first in range(start, stop, BLOCK):
        size = min(BLOCK, stop - first)
        origin, total = more[0, :size], more[1, :size]
        if base[0].stored == NO_TENSOR:
            for i in range(size):
                total[i] = np.float32(0)
        else:
            _widen(base[0].stored, base[0].address, first, origin)
            for i in range(size):  # assigning the whole slice is four times slower
                total[i] = origin[i]
        for m in range(many):
            if models[m].mask == KEEP_ALL and not elected:
                _add(models[m], origin, first, total)
                continue
            row, scale = rows[m, :size], models[m].scale
            _read(models[m], origin, first, row)
            _mask(models[m], first, row, words[: (size + 1) // 2])
            if elected:
                for i in range(size):
                    row[i] *= scale
            else:
                for i in range(size):
                    total[i] += scale * row[i]
        if elected:
            mixed, shares = more[3, :size], more[4, :size]
            _elect(rows, models, more[2, :size], mixed, shares)
            for i in range(size):
                share = shares[i] if normalize & (shares[i] != np.float32(0)) else np.float32(1)
                total[i] += times * (mixed[i] / share)
        _narrow(total, out[0].stored, out[0].address, first)


@compiled
def absolute_sums(models: Any, base: Any, start: int, stop: int, sums: NDArray[np.float64]) -> None:
    """Write Σ|x| of the first model's masked task vector for each block."""
    row, origin, words = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK // 2, np.uint64)
    for first in range(start, stop, BLOCK):
        size = min(BLOCK, stop - first)
        _read_first(models, base, first, origin[:size], row[:size])
        _mask(models[0], first, row[:size], words[: (size + 1) // 2])
        sums[first // BLOCK] = absolute_sum(row[:size])


@compiled
def sums_by_share(models: Any, base: Any, start: int, stop: int, sums: NDArray[np.float64]) -> None:
    """Add each |x| of the first model's task vector to the sum of the share (of `SHARES`) of its random bits."""
    row, origin, words = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK // 2, np.uint64)
    bits = words.view(np.uint32)
    for first in range(start, stop, BLOCK):
        size = min(BLOCK, stop - first)
        _read_first(models, base, first, origin[:size], row[:size])
        _random_bits(models[0].seed, first // 2, words[: (size + 1) // 2])
        for i in range(size):
            share = (np.uint64(bits[i]) * np.uint64(SHARES)) >> np.uint64(32)
            sums[share] += np.float64(abs(row[i]))


@compiled
def count_magnitudes(models: Any, base: Any, start: int, stop: int, counts: NDArray[np.int64]) -> None:
    """Add to the histogram of the first model's magnitudes, without zeros.

    A bin is the upper half of a magnitude's bits, so larger magnitudes are in later bins.
    """
    row, origin = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    bits = row.view(np.uint32)
    for first in range(start, stop, BLOCK):
        size = min(BLOCK, stop - first)
        _read_first(models, base, first, origin[:size], row[:size])
        for i in range(size):
            magnitude = bits[i] & np.uint32(0x7FFFFFFF)
            counts[magnitude >> np.uint32(16)] += 1 if magnitude else 0


@compiled
def count_within_bin(models: Any, base: Any, place: int, start: int, stop: int, counts: NDArray[np.int32]) -> None:
    """Add to the histogram of the lower halves of the magnitudes in one bin of `count_magnitudes`."""
    row, origin = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    bits = row.view(np.uint32)
    for first in range(start, stop, BLOCK):
        size = min(BLOCK, stop - first)
        _read_first(models, base, first, origin[:size], row[:size])
        for i in range(size):
            magnitude = bits[i] & np.uint32(0x7FFFFFFF)
            if magnitude >> np.uint32(16) == np.uint32(place):
                counts[magnitude & np.uint32(0xFFFF)] += 1


@compiled
def count_equal(models: Any, base: Any, equal: int, start: int, stop: int, counts: NDArray[np.int32]) -> None:
    """Count the magnitudes that are, as bits, `equal` for each block."""
    row, origin = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    bits = row.view(np.uint32)
    for first in range(start, stop, BLOCK):
        size = min(BLOCK, stop - first)
        _read_first(models, base, first, origin[:size], row[:size])
        many = np.uint32(0)
        for i in range(size):
            many += np.uint32((bits[i] & np.uint32(0x7FFFFFFF)) == np.uint32(equal))
        counts[first // BLOCK] = many


@compiled
def read(models: Any, base: Any, start: int, stop: int, out: Floats) -> None:
    """Read entries `start` to `stop` of the first model's task vector (or weight, without a base) into `out`."""
    origin = np.empty(BLOCK, np.float32)
    for first in range(start, stop, BLOCK):
        size = min(BLOCK, stop - first)
        _read_first(models, base, first, origin[:size], out[first - start : first - start + size])


@compiled
def finite(tensor: Any, start: int, stop: int) -> bool:
    """Return whether all entries are finite."""
    if tensor[0].stored == BFLOAT16:
        halves = carray(_pointer(tensor[0].address), stop, np.uint16)[start:stop]
        largest = np.uint16(0)
        for i in range(len(halves)):
            largest = max(largest, np.uint16(halves[i] & np.uint16(0x7FFF)))
        return bool(largest < np.uint16(0x7F80))
    words = carray(_pointer(tensor[0].address), stop, np.uint32)[start:stop]
    worst = np.uint32(0)
    for i in range(len(words)):
        worst = max(worst, words[i] & np.uint32(0x7FFFFFFF))
    return bool(worst < np.uint32(0x7F800000))
