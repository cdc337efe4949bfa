"""Where the k largest magnitudes of a task vector end, exactly and without sorting.

A histogram over the upper half of a float32's bits tells in which bin the k-th largest lies, and one over the lower
half of what lies in that bin tells it exactly. Both are kept, bin by bin: candidates of a search ask for neighbouring
k, and differences of 16-bit weights have few distinct magnitudes, so soon nothing is left to be counted.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmevo.merging.kernels import fused
from llmevo.merging.kernels.blocks import Operand
from llmevo.merging.kernels.records import Mask, blocks_of, over_chunks, table
from llmevo.merging.methods.base import TensorGroup

SMALL = 1 << 12
"""Entries up to which a tensor's magnitudes are sorted instead of counted."""


@dataclass(frozen=True)
class Bound:
    """The magnitude, as bits, from which on entries belong to the largest; of those equal to it, up to `last`."""

    bits: int
    last: int


ABOVE_ALL = Bound(0x7FFFFFFF, -1)


def bound(inputs: TensorGroup, model: int, operand: Operand, keep: int, what: str = "bound") -> Bound:
    """Where the `keep` largest entries of one model's task vector end; of equal ones the first are kept."""
    if not keep:
        return ABOVE_ALL
    magnitudes = _Magnitudes(inputs, model, operand, Operand.of(inputs.origin))
    if operand.size <= SMALL:
        return magnitudes.sorted_bound(keep)
    return inputs.keep_latest(what, model, keep, lambda: magnitudes.bound(keep))


def window(low: Bound, high: Bound = ABOVE_ALL) -> Mask:
    """Keep the entries that are among the largest by `low`, but not by `high`."""
    names = ("low", "low_last", "high", "high_last")
    return Mask({"mask": fused.KEEP_WINDOW} | dict(zip(names, (low.bits, low.last, high.bits, high.last), strict=True)))


class _Magnitudes:
    """The magnitudes of one model's task vector, counted as far as they are asked for."""

    def __init__(self, inputs: TensorGroup, model: int, operand: Operand, origin: Operand) -> None:
        self._inputs, self._model = inputs, model
        self._operands, self._size = (operand, origin), operand.size
        self._of, self._base = table([operand]), table([origin])

    def bound(self, keep: int) -> Bound:
        """By counting."""
        inputs, model = self._inputs, self._model
        bins = inputs.keep("magnitudes", model, self._bins)
        if keep >= bins[-1]:
            return Bound(1, self._size)  # entries that are 0 stay 0 whether they are kept or not
        reverse = int(np.searchsorted(bins, keep))
        above, place = int(bins[reverse - 1]) if reverse else 0, len(bins) - 1 - reverse
        halves, many = inputs.keep(f"magnitudes of bin {place}", model, lambda: self._within(place))
        low = int(np.searchsorted(many, keep - above))
        wanted, bits = keep - above - (int(many[low - 1]) if low else 0), (place << 16) + int(halves[low])
        counts = inputs.keep(f"places of magnitude {bits}", model, lambda: self._places(bits))
        block = int(np.searchsorted(counts, wanted))
        start, stop = block * fused.BLOCK, min((block + 1) * fused.BLOCK, self._size)
        equal = np.flatnonzero(self._read(start, stop) == bits)
        return Bound(bits, start + int(equal[wanted - 1 - (int(counts[block - 1]) if block else 0)]))

    def _bins(self) -> NDArray[np.int64]:
        """How many magnitudes there are in the last bin, the last two, and so on; those of 0 not counted."""

        def count(start: int, stop: int) -> NDArray[np.int64]:
            counts = np.zeros(1 << 15, np.int64)
            fused.count_magnitudes(self._of, self._base, start, stop, counts)
            return counts

        return np.cumsum(np.sum(over_chunks(self._size, count), axis=0)[::-1])

    def _within(self, place: int) -> NDArray[np.int64]:
        """The lower halves in one bin, the largest first, and how many magnitudes have this one or a larger."""

        def count(start: int, stop: int) -> NDArray[np.int32]:
            counts = np.zeros(1 << 16, np.int32)
            fused.count_within_bin(self._of, self._base, place, start, stop, counts)
            return counts

        counts = np.sum(over_chunks(self._size, count), axis=0)
        halves = np.flatnonzero(counts)[::-1]
        return np.stack([halves, np.cumsum(counts[halves])])

    def _places(self, bits: int) -> NDArray[np.int32]:
        """How many magnitudes are equal to `bits` in the first block, the first two, and so on."""
        counts = np.zeros(blocks_of(self._size), np.int32)
        over_chunks(self._size, lambda start, stop: fused.count_equal(self._of, self._base, bits, start, stop, counts))
        return np.cumsum(counts, dtype=np.int32)

    def _read(self, start: int, stop: int) -> NDArray[np.uint32]:
        row = np.empty(stop - start, np.float32)
        fused.read(self._of, self._base, start, stop, row)
        return row.view(np.uint32) & np.uint32(0x7FFFFFFF)

    def sorted_bound(self, keep: int) -> Bound:
        """By sorting, which for a few entries is quicker than counting."""
        magnitudes = self._read(0, self._size)
        if keep >= np.count_nonzero(magnitudes):
            return Bound(1, self._size)
        bits = int(np.partition(magnitudes, self._size - keep)[self._size - keep])
        wanted = keep - int(np.count_nonzero(magnitudes > bits))
        return Bound(bits, int(np.flatnonzero(magnitudes == bits)[wanted - 1]))
