"""Generalized task arithmetic: mask the task vectors, rescale, elect signs, add to the base, in one pass.

The family of linear, task arithmetic, TIES, DARE, Breadcrumbs and DELLA, in mergekit's order of operations. A method
of the family says what is kept of each task vector (`Mask`); the rest is here.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmevo.methods import fused
from llmevo.methods.base import Inputs, LowRank, Parameter, Weight, divisor, least_divisor, same
from llmevo.methods.blocks import Operand, empty, flat, in_parts, task_vectors

WEIGHT = Parameter(default=None, low=0.0, high=1.5)
DENSITY = Parameter(default=1.0, low=0.01, high=1.0, start=1.0)
"""The share of the entries that is kept."""


@dataclass(frozen=True)
class Mask:
    """What is kept of a task vector, as fields of a `fused.MODEL` record."""

    fields: Mapping[str, Any]
    held: Sequence[Any] = field(default=())
    """Arrays whose addresses are among the fields."""

    @property
    def tag(self) -> Hashable:
        """What tells this mask of a task vector from others of the same one."""
        return tuple(value for name, value in self.fields.items() if name != "ranks")


FIELDS: tuple[str, ...] = fused.MODEL.names or ()
EMPTY = (0,) * len(FIELDS)

NOTHING = Mask({"mask": fused.KEEP_NONE})

MakeMask = Callable[[Inputs, int, Operand], Mask | None]
"""The mask of one model's task vector; None keeps all of it."""


def shared(normalize: bool, rescale: bool) -> dict[str, Parameter]:
    """The family's parameters of the whole merge, with a method's own defaults.

    `rescale` scales what is kept of a task vector to the L1 norm it had, as mergekit does; `inverse_density` divides
    each kept entry by the probability with which it was kept, as the papers of DARE and DELLA do, instead.
    """
    return {
        "normalize": Parameter(default=normalize),
        "rescale": Parameter(default=rescale),
        "inverse_density": Parameter(default=False),
        "lambda": Parameter(default=1.0),
    }


def merge_sparse(inputs: Inputs, make_mask: MakeMask, elected: bool) -> Tensor:
    """base + λ · Σ wᵢ · masked task vector i, with `elected` of the entries that agree with the majority."""
    terms = [
        (place, operand, make_mask(inputs, place, operand), inputs.each["weight"][place])
        for place, operand in enumerate(task_vectors(inputs))
        if inputs.each["weight"][place] != 0.0
    ]
    origin, weights = Operand(flat(inputs.origin), False), [weight for *_, weight in terms]

    def restored(place: int, operand: Operand, mask: Mask | None) -> float:
        """What to multiply a masked task vector by for the L1 norm it had.

        Where so little is left that the ratio means nothing (norms under 1e-7) nothing is scaled.
        """
        if mask is None or not inputs.shared["rescale"] or inputs.shared["inverse_density"]:
            return 1.0
        before = inputs.keep("absolute sum", place, lambda: _absolute_sum(operand, None, origin))
        after = inputs.keep_latest("kept sum", place, mask.tag, lambda: _absolute_sum(operand, mask, origin))
        return before / after if min(before, after) >= 1e-7 else 1.0

    models = table([operand for _, operand, *_ in terms], [mask for _, _, mask, _ in terms])
    models["weight"] = weights
    models["scale"] = [weight * restored(place, operand, mask) for place, operand, mask, weight in terms]
    normalize = bool(inputs.shared["normalize"])
    factor = inputs.shared["lambda"] / (divisor(weights) if normalize and not elected else 1.0)
    if not elected:
        models["scale"] *= np.float32(factor)
    merged, out = empty(inputs.origin.shape, inputs.dtype)
    least = least_divisor(weights)
    base, target = table([origin]), table([Operand(out, False)])
    over_chunks(
        merged.numel(),
        lambda start, stop: fused.combine(models, base, target, elected, normalize, least, factor, start, stop),
    )
    return merged


def weighted_sum(models: Sequence[Weight], scales: Sequence[float], base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """base + Σ sᵢ·(xᵢ - base), or without a base Σ sᵢ·xᵢ; in float32, rounded once to `dtype`.

    A model whose scale is exactly 0 is not read, and one alone with scale 1 is returned as it is. Low-rank models are
    added as one product of their stacked factors, and what lies under several of them is read once.
    """
    terms = [(model, scale) for model, scale in zip(models, scales, strict=True) if scale != 0.0]
    if base is None and len(terms) == 1 and terms[0][1] == 1.0 and isinstance(terms[0][0], Tensor):
        return terms[0][0]  # bit for bit, which 0 + x is not for the zero below zero
    under = _gathered([(model.origin if isinstance(model, LowRank) else model, scale) for model, scale in terms])
    operands = [(Operand(flat(t), base is not None), s) for t, s in under if base is None or not same(t, base)]
    if low := [(model, scale) for model, scale in terms if isinstance(model, LowRank)]:
        product = torch.cat([model.up * scale for model, scale in low], dim=1) @ torch.cat([m.down for m, _ in low])
        operands.append((Operand(flat(product), False), 1.0))
    first = base if base is not None else models[0]
    merged, out = empty((first.origin if isinstance(first, LowRank) else first).shape, dtype)
    origin = None if base is None else Operand(flat(base), False)
    at, target, records = table([origin]), table([Operand(out, False)]), table([operand for operand, _ in operands])
    records["scale"] = [scale for _, scale in operands]
    over_chunks(
        merged.numel(),
        lambda start, stop: fused.combine(records, at, target, False, False, 0.0, 1.0, start, stop),
    )
    return merged


def table(operands: Sequence[Operand | None], masks: Sequence[Mask | None] = ()) -> NDArray[Any]:
    """The `fused.MODEL` records of some models; they hold addresses, so the operands have to outlive them."""
    rows = [_record(operand, mask) for operand, mask in zip_longest(operands, masks)]
    return np.array(rows, fused.MODEL)


def _record(operand: Operand | None, mask: Mask | None) -> tuple[Any, ...]:
    if operand is None:
        return EMPTY
    stored = fused.BFLOAT16 if operand.stored.dtype == np.uint16 else fused.FLOAT32
    start = (operand.stored.ctypes.data, stored, operand.less_base)
    rest = EMPTY[3:] if mask is None else tuple(mask.fields.get(name, 0) for name in FIELDS[3:])
    return (*start, *rest)


def over_chunks(size: int, work: Callable[[int, int], Any]) -> list[Any]:
    """`work(start, stop)` for as many parts of a tensor of `size` entries as there are threads, in whole blocks."""
    return in_parts(
        range(blocks_of(size)), lambda mine: [work(mine[0] * fused.BLOCK, min((mine[-1] + 1) * fused.BLOCK, size))]
    )


def blocks_of(size: int) -> int:
    """How many blocks a tensor of `size` entries has."""
    return -(-size // fused.BLOCK)


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    operand = Operand(flat(tensor), False)
    records = table([operand])
    return fused.finite(records, 0, tensor.numel())


def _gathered(terms: Sequence[tuple[Tensor, float]]) -> list[tuple[Tensor, float]]:
    """The same terms, with those of one tensor put together."""
    unique: list[Tensor] = []
    for tensor, _ in terms:
        if not any(same(tensor, other) for other in unique):
            unique.append(tensor)
    return [(tensor, sum(scale for other, scale in terms if same(other, tensor))) for tensor in unique]


def _absolute_sum(operand: Operand, mask: Mask | None, origin: Operand) -> float:
    """The L1 norm of what is kept of a task vector."""
    size, model, base = len(origin.stored), table([operand], [mask]), table([origin])
    sums = np.zeros(blocks_of(size), np.float64)
    over_chunks(size, lambda start, stop: fused.absolute_sums(model, base, start, stop, sums))
    return math.fsum(sums)  # exact, so it does not depend on how the blocks were shared out


class Magnitudes:
    """The magnitudes of one task vector, counted once: finds the exact k-th largest at any k without sorting.

    A histogram over the upper half of a float32's bits tells in which bin the k-th lies; a second one, over the lower
    half of what lies in that bin, tells it exactly.
    """

    def __init__(self, operand: Operand, origin: Operand) -> None:
        size, model, base = len(origin.stored), table([operand]), table([origin])

        def count(start: int, stop: int) -> NDArray[np.int64]:
            counts = np.zeros(1 << 15, np.int64)
            fused.count_magnitudes(model, base, start, stop, counts)
            return counts

        self._largest_first = np.cumsum(np.sum(over_chunks(size, count), axis=0)[::-1])
        self.nbytes = self._largest_first.nbytes

    def bound(self, keep: int, operand: Operand, origin: Operand) -> "Bound":
        """Where the `keep` largest entries end; of equal ones the first in the tensor are kept."""
        # Entries that are 0 stay 0 whether they are kept or not.
        if keep >= self._largest_first[-1]:
            return Bound(1, len(origin.stored))
        size, model, base = len(origin.stored), table([operand]), table([origin])
        reverse = int(np.searchsorted(self._largest_first, keep))
        above, place = int(self._largest_first[reverse - 1]) if reverse else 0, (1 << 15) - 1 - reverse

        def count(start: int, stop: int) -> NDArray[np.int32]:
            counts = np.zeros(1 << 16, np.int32)
            fused.count_within_bin(model, base, place, start, stop, counts)
            return counts

        within = np.cumsum(np.sum(over_chunks(size, count), axis=0)[::-1])
        low = int(np.searchsorted(within, keep - above))
        wanted = keep - above - (int(within[low - 1]) if low else 0)
        bits = (place << 16) + (1 << 16) - 1 - low
        return Bound(bits, _position(bits, wanted, model, base, size))


def _position(bits: int, wanted: int, model: NDArray[Any], base: NDArray[Any], size: int) -> int:
    """Where in the tensor the `wanted`-th magnitude lies that is equal to `bits`."""
    counts = np.zeros(blocks_of(size), np.int64)
    over_chunks(size, lambda start, stop: fused.count_equal(model, base, bits, start, stop, counts))
    totals = np.cumsum(counts)
    block = int(np.searchsorted(totals, wanted))
    start, stop = block * fused.BLOCK, min((block + 1) * fused.BLOCK, size)
    row = np.empty(stop - start, np.float32)
    fused.read(model, base, start, stop, row)
    equal = np.flatnonzero((row.view(np.uint32) & np.uint32(0x7FFFFFFF)) == bits)
    return start + int(equal[wanted - 1 - (int(totals[block - 1]) if block else 0)])


@dataclass(frozen=True)
class Bound:
    """The magnitude, as bits, from which on entries belong to the largest; of those equal to it, up to `last`."""

    bits: int
    last: int


SMALL = 1 << 12
"""Entries up to which a tensor's magnitudes are sorted instead of counted."""

ABOVE_ALL = Bound(0x7FFFFFFF, -1)


def bound(inputs: Inputs, model: int, operand: Operand, keep: int, what: str = "bound") -> Bound:
    """Where the `keep` largest entries of one model's task vector end."""
    if not keep:
        return ABOVE_ALL
    origin = Operand(flat(inputs.origin), False)
    if len(origin.stored) <= SMALL:
        return _bound_of_small(keep, operand, origin)
    counted = inputs.keep("magnitudes", model, lambda: Magnitudes(operand, origin))
    return inputs.keep_latest(what, model, keep, lambda: counted.bound(keep, operand, origin))


def _bound_of_small(keep: int, operand: Operand, origin: Operand) -> Bound:
    """The same by sorting, which for a few entries is quicker than counting."""
    row = np.empty(len(origin.stored), np.float32)
    fused.read(table([operand]), table([origin]), 0, len(row), row)
    magnitudes = row.view(np.uint32) & np.uint32(0x7FFFFFFF)
    if keep >= np.count_nonzero(magnitudes):
        return Bound(1, len(row))
    bits = int(np.partition(magnitudes, len(row) - keep)[len(row) - keep])
    wanted = keep - int(np.count_nonzero(magnitudes > bits))
    return Bound(bits, int(np.flatnonzero(magnitudes == bits)[wanted - 1]))


def window(low: Bound, high: Bound = ABOVE_ALL) -> Mask:
    """Keep the entries that are among the largest by `low`, but not by `high`."""
    names = ("low", "low_last", "high", "high_last")
    return Mask({"mask": fused.KEEP_WINDOW} | dict(zip(names, (low.bits, low.last, high.bits, high.last), strict=True)))


def random_mask(seed: int, density: float, inverse: bool) -> Mask:
    """Keep each entry with probability `density`, with `inverse` divided by it; seed and place alone decide."""
    return Mask(
        {
            "mask": fused.DROP,
            "seed": seed,
            "threshold": min(round(density * 2**32), 2**32 - 1),
            "lowest": density,
            "inverse": inverse,
        }
    )


def ranked_mask(seed: int, ranks: NDArray[np.uint16 | np.uint32], lowest: float, step: float, inverse: bool) -> Mask:
    """Keep an entry of rank r with probability lowest + step · r, with `inverse` divided by that."""
    return Mask(
        {
            "mask": fused.DROP_BY_RANK,
            "seed": seed,
            "ranks": ranks.ctypes.data,
            "wide_ranks": ranks.dtype == np.uint32,
            "lowest": lowest,
            "step": step,
            "inverse": inverse,
        },
        held=[ranks],
    )
