"""Generalized task arithmetic: mask the task vectors, rescale, elect signs, add to the base, in one pass.

The family of linear, task arithmetic, TIES, DARE, Breadcrumbs and DELLA, in mergekit's order of operations. A method
of the family determines the mask of each task vector.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmevo.merging.kernels import loops
from llmevo.merging.kernels.blocks import Operand, empty, in_parts, task_vectors
from llmevo.merging.methods.base import TensorGroup, divisor
from llmevo.models.checkpoints import LowRank, Weight, same, stored

SMALL = 1 << 12
"""Entries up to which a tensor's magnitudes are sorted instead of counted."""

SUMMED = 1 << 22
"""Entries that are summed up one after another: the same parts, and so the same bits, on any number of threads."""


@dataclass(frozen=True)
class Mask:
    """The entries of a task vector that are kept, as fields of a `loops.MODEL` record."""

    fields: Mapping[str, Any]
    held: Sequence[Any] = ()
    """Arrays whose addresses are among the fields."""
    shares: int | None = None
    """For a random mask that keeps a whole number of `loops.SHARES`: that number."""

    @property
    def tag(self) -> Hashable:
        """A value that distinguishes this mask of a task vector from others of the same one."""
        return tuple(value for name, value in self.fields.items() if name != "ranks")


MakeMask = Callable[[TensorGroup, int, Operand], Mask | None]
"""The mask of one model's task vector; None keeps all of it."""

NOTHING = Mask({"mask": loops.KEEP_NONE})


def random_mask(seed: int, density: float, inverse: bool) -> Mask:
    """Keep each entry with probability `density`, with `inverse` divided by it; seed and place alone decide."""
    shares = round(density * loops.SHARES)
    whole = math.isclose(shares, density * loops.SHARES, rel_tol=1e-9)
    below = -(-(shares << 32) // loops.SHARES) if whole else math.ceil(density * 2**32)
    below = min(below, 2**32 - 1)  # a density within 2⁻³² of 1
    fields = {"mask": loops.DROP, "seed": seed, "threshold": below, "lowest": density, "inverse": inverse}
    return Mask(fields, shares=shares if whole else None)


def ranked_mask(seed: int, ranks: NDArray[np.uint16 | np.uint32], lowest: float, step: float, inverse: bool) -> Mask:
    """Keep an entry of rank r with probability lowest + step · r, with `inverse` divided by that."""
    fields = {"mask": loops.DROP_BY_RANK, "seed": seed, "lowest": lowest, "step": step, "inverse": inverse}
    address = {"ranks": ranks.ctypes.data, "wide_ranks": ranks.dtype == np.uint32}
    return Mask({**fields, **address}, held=[ranks])


@dataclass(frozen=True)
class Bound:
    """The smallest magnitude, as bits, among the largest entries; of the entries equal to it, those up to `last`."""

    bits: int
    last: int


ABOVE_ALL = Bound(0x7FFFFFFF, -1)


def window(low: Bound, high: Bound = ABOVE_ALL) -> Mask:
    """Keep the entries that are among the largest by `low`, but not by `high`."""
    return Mask(
        {"mask": loops.KEEP_WINDOW, "low": low.bits, "low_last": low.last, "high": high.bits, "high_last": high.last}
    )


def bound(inputs: TensorGroup, model: int, operand: Operand, keep: int, what: str = "bound") -> Bound:
    """Return where the `keep` largest entries of one model's task vector end; of equal entries the first are kept."""
    if not keep:
        return ABOVE_ALL
    magnitudes = _Magnitudes(inputs, model, operand, Operand.of(inputs.origin))
    if operand.size <= SMALL:
        return magnitudes.sorted_bound(keep)
    return inputs.keep_latest(what, keep, lambda: magnitudes.bound(keep), model)


class _Magnitudes:
    """The magnitudes of one model's task vector, to find the k-th largest exactly and without sorting.

    A histogram over the upper half of a float32's bits gives the bin of the k-th largest, and one over the lower half
    of the magnitudes in that bin gives its value. Both are cached, bin by bin: the candidates of a search need
    neighbouring k, and differences of 16-bit weights have few distinct magnitudes.
    """

    def __init__(self, inputs: TensorGroup, model: int, operand: Operand, origin: Operand) -> None:
        self._inputs, self._model = inputs, model
        self._operands, self._size = (operand, origin), operand.size
        self._of, self._base = table([operand]), table([origin])

    def bound(self, keep: int) -> Bound:
        """Return the bound by counting."""
        inputs, model = self._inputs, self._model
        bins = inputs.keep("magnitudes", self._bins, model)
        if keep >= bins[-1]:
            return Bound(1, self._size)  # entries that are 0 stay 0 whether they are kept or not
        reverse = int(np.searchsorted(bins, keep))
        above, place = int(bins[reverse - 1]) if reverse else 0, len(bins) - 1 - reverse
        halves, many = inputs.keep(f"magnitudes of bin {place}", lambda: self._within(place), model)
        low = int(np.searchsorted(many, keep - above))
        wanted, bits = keep - above - (int(many[low - 1]) if low else 0), (place << 16) + int(halves[low])
        counts = inputs.keep(f"places of magnitude {bits}", lambda: self._places(bits), model)
        block = int(np.searchsorted(counts, wanted))
        start, stop = block * loops.BLOCK, min((block + 1) * loops.BLOCK, self._size)
        equal = np.flatnonzero(self._read(start, stop) == bits)
        return Bound(bits, start + int(equal[wanted - 1 - (int(counts[block - 1]) if block else 0)]))

    def _bins(self) -> NDArray[np.int64]:
        """Return the number of magnitudes in the last bin, the last two, and so on, without zeros."""

        def count(start: int, stop: int) -> NDArray[np.int64]:
            counts = np.zeros(1 << 15, np.int64)
            loops.count_magnitudes(self._of, self._base, start, stop, counts)
            return counts

        return np.cumsum(np.sum(over_chunks(self._size, count), axis=0)[::-1])

    def _within(self, place: int) -> NDArray[np.int64]:
        """Return the lower halves in one bin, the largest first, and the number of magnitudes from there on."""

        def count(start: int, stop: int) -> NDArray[np.int32]:
            counts = np.zeros(1 << 16, np.int32)
            loops.count_within_bin(self._of, self._base, place, start, stop, counts)
            return counts

        counts = np.sum(over_chunks(self._size, count), axis=0)
        halves = np.flatnonzero(counts)[::-1]
        return np.stack([halves, np.cumsum(counts[halves])])

    def _places(self, bits: int) -> NDArray[np.int32]:
        """Return the number of magnitudes equal to `bits` in the first block, the first two, and so on."""
        counts = np.zeros(blocks_of(self._size), np.int32)
        over_chunks(self._size, lambda start, stop: loops.count_equal(self._of, self._base, bits, start, stop, counts))
        return np.cumsum(counts, dtype=np.int32)

    def _read(self, start: int, stop: int) -> NDArray[np.uint32]:
        row = np.empty(stop - start, np.float32)
        loops.read(self._of, self._base, start, stop, row)
        return row.view(np.uint32) & np.uint32(0x7FFFFFFF)

    def sorted_bound(self, keep: int) -> Bound:
        """Return the bound by sorting, which is faster for a few entries."""
        magnitudes = self._read(0, self._size)
        if keep >= np.count_nonzero(magnitudes):
            return Bound(1, self._size)
        bits = int(np.partition(magnitudes, self._size - keep)[self._size - keep])
        wanted = keep - int(np.count_nonzero(magnitudes > bits))
        return Bound(bits, int(np.flatnonzero(magnitudes == bits)[wanted - 1]))


def table(operands: Sequence[Operand | None], masks: Sequence[Mask | None] = ()) -> NDArray[Any]:
    """Return the `loops.MODEL` records of some models; they hold addresses, so the operands have to outlive them."""
    records = np.zeros(len(operands), loops.MODEL)
    for record, operand, mask in zip_longest(records, operands, masks):
        if operand is not None:
            stored_as = loops.BFLOAT16 if operand.weight.dtype == torch.bfloat16 else loops.FLOAT32
            given = {"address": operand.weight.data_ptr(), "stored": stored_as, "less_base": operand.less_base}
            for name, value in {**given, **(mask.fields if mask else {})}.items():
                record[name] = value
    return records


def over_chunks(size: int, work: Callable[[int, int], Any]) -> list[Any]:
    """Call `work(start, stop)` for as many parts of `size` entries as there are threads, in whole blocks."""
    return in_parts(
        range(blocks_of(size)), lambda mine: [work(mine[0] * loops.BLOCK, min((mine[-1] + 1) * loops.BLOCK, size))]
    )


def blocks_of(size: int) -> int:
    """Return the number of blocks of a tensor of `size` entries."""
    return -(-size // loops.BLOCK)


def is_finite(tensor: Tensor) -> bool:
    """Return whether no entry is NaN or infinite."""
    operand = Operand.of(tensor)
    records = table([operand])
    return all(over_chunks(operand.size, lambda start, stop: loops.finite(records, start, stop)))


def is_finite_weight(weight: Weight) -> bool:
    """Return whether no entry is NaN or infinite; of a low-rank weight none of its parts."""
    tensors = [weight.origin, weight.up, weight.down] if isinstance(weight, LowRank) else [weight]
    return all(is_finite(tensor) for tensor in tensors if tensor.is_floating_point())


def merge_sparse(inputs: TensorGroup, make_mask: MakeMask, elected: bool) -> Tensor:
    """Return base + λ · Σ wᵢ · masked task vector i, with `elected` of the entries that agree with the majority."""
    terms = [
        (place, operand, make_mask(inputs, place, operand), inputs.each["weight"][place])
        for place, operand in enumerate(task_vectors(inputs))
        if inputs.each["weight"][place] != 0.0
    ]
    origin, weights = Operand.of(inputs.origin), [weight for *_, weight in terms]
    rescaled = inputs.shared["rescale"] and not inputs.shared["inverse_density"]

    def restored(place: int, operand: Operand, mask: Mask | None) -> float:
        return _restored(inputs, place, operand, mask, origin) if rescaled and mask else 1.0

    elected = elected and bool(terms)
    models = table([operand for _, operand, *_ in terms], [mask for _, _, mask, _ in terms])
    models["weight"] = weights
    models["scale"] = [weight * restored(place, operand, mask) for place, operand, mask, weight in terms]
    normalize = bool(inputs.shared["normalize"])
    factor = inputs.shared["lambda"] / (divisor(weights) if normalize and not elected else 1.0)
    if not elected:
        models["scale"] *= np.float32(factor)
    return _combined(models, origin, inputs.origin.shape, inputs.dtype, elected, normalize, factor)


def weighted_sum(models: Sequence[Weight], scales: Sequence[float], base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return base + Σ sᵢ·(xᵢ - base), or without a base Σ sᵢ·xᵢ; in float32, rounded once to `dtype`.

    A model whose scale is exactly 0 is not read, and a single one with scale 1 is returned as it is. Low-rank models
    are added as one product of their stacked factors, and the weight under several of them is read once.
    """
    first = base if base is not None else models[0]
    shape = stored(first).shape
    terms = [(model, scale) for model, scale in zip(models, scales, strict=True) if scale != 0.0]
    if base is None and len(terms) == 1 and terms[0][1] == 1.0 and isinstance(terms[0][0], Tensor):
        return terms[0][0]  # bit for bit, which 0 + x is not for negative zero
    under = _grouped([(stored(model), scale) for model, scale in terms])
    operands = [(Operand.of(t, base is not None), s) for t, s in under if base is None or not same(t, base)]
    if low := [(model, scale) for model, scale in terms if isinstance(model, LowRank)]:
        ups, downs = torch.cat([model.up * scale for model, scale in low], dim=1), torch.cat([m.down for m, _ in low])
        product = torch.mm(ups, downs, out=empty(shape, torch.float32))
        operands.append((Operand.of(product), 1.0))
    records = table([operand for operand, _ in operands])
    records["scale"] = [scale for _, scale in operands]
    return _combined(records, None if base is None else Operand.of(base), shape, dtype)


def _combined(
    models: NDArray[Any],
    origin: Operand | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    elected: bool = False,
    normalize: bool = False,
    factor: float = 1.0,
) -> Tensor:
    merged = empty(shape, dtype)
    base, target = table([origin]), table([Operand.of(merged)])
    over_chunks(
        merged.numel(), lambda start, stop: loops.combine(models, base, target, elected, normalize, factor, start, stop)
    )
    return merged


def _grouped(terms: Sequence[tuple[Tensor, float]]) -> list[tuple[Tensor, float]]:
    """Return the same terms, with one term for each tensor."""
    unique: list[Tensor] = []
    for tensor, _ in terms:
        if not any(same(tensor, other) for other in unique):
            unique.append(tensor)
    return [(tensor, sum(scale for other, scale in terms if same(other, tensor))) for tensor in unique]


def _restored(inputs: TensorGroup, place: int, operand: Operand, mask: Mask, origin: Operand) -> float:
    """Return the factor that gives a masked task vector the L1 norm it had; 1 where a norm is under 1e-7."""
    if mask.shares is not None and operand.size > loops.SHARES:
        seed = mask.fields["seed"]
        sums = inputs.keep(f"sums by share {seed}", lambda: _sums_by_share(operand, mask, origin), place)
        before, after = float(sums[-1]), float(sums[mask.shares - 1])
    else:
        before = inputs.keep("absolute sum", lambda: _absolute_sum(operand, None, origin), place)
        after = inputs.keep_latest("kept sum", mask.tag, lambda: _absolute_sum(operand, mask, origin), place)
    return before / after if min(before, after) >= 1e-7 else 1.0


def _absolute_sum(operand: Operand, mask: Mask | None, origin: Operand) -> float:
    """Return the L1 norm of the masked task vector."""
    model, base = table([operand], [mask]), table([origin])
    sums = np.zeros(blocks_of(operand.size), np.float64)
    over_chunks(operand.size, lambda start, stop: loops.absolute_sums(model, base, start, stop, sums))
    return math.fsum(sums)  # exact, so it does not depend on the number of threads


def _sums_by_share(operand: Operand, mask: Mask, origin: Operand) -> NDArray[np.float64]:
    """Return the L1 norms of a randomly masked task vector at each density of a whole number of shares."""
    model, base, size = table([operand], [mask]), table([origin]), operand.size

    def part(starts: range) -> list[NDArray[np.float64]]:
        sums = np.zeros((len(starts), loops.SHARES), np.float64)
        for row, start in zip(sums, starts, strict=True):
            loops.sums_by_share(model, base, start, min(start + SUMMED, size), row)
        return [*sums]

    return np.cumsum(np.sum(in_parts(range(0, size, SUMMED), part), axis=0))
