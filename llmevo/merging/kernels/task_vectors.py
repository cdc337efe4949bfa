"""Generalized task arithmetic: mask the task vectors, rescale, elect signs, add to the base, in one pass.

The family of linear, task arithmetic, TIES, DARE, Breadcrumbs and DELLA, in mergekit's order of operations. A method
of the family says what is kept of each task vector (`Mask`); the rest is here.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmevo.merging.kernels import fused
from llmevo.merging.kernels.blocks import Operand, empty, in_parts, task_vectors
from llmevo.merging.kernels.records import Mask, blocks_of, over_chunks, table
from llmevo.merging.methods.base import TensorGroup, divisor
from llmevo.models.weights import LowRank, Weight, same, stored

MakeMask = Callable[[TensorGroup, int, Operand], Mask | None]
"""The mask of one model's task vector; None keeps all of it."""


def merge_sparse(inputs: TensorGroup, make_mask: MakeMask, elected: bool) -> Tensor:
    """base + λ · Σ wᵢ · masked task vector i, with `elected` of the entries that agree with the majority."""
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
    merged = empty(inputs.origin.shape, inputs.dtype)
    base, target = table([origin]), table([Operand.of(merged)])
    over_chunks(
        merged.numel(),
        lambda start, stop: fused.combine(models, base, target, elected, normalize, factor, start, stop),
    )
    return merged


def weighted_sum(models: Sequence[Weight], scales: Sequence[float], base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """base + Σ sᵢ·(xᵢ - base), or without a base Σ sᵢ·xᵢ; in float32, rounded once to `dtype`.

    A model whose scale is exactly 0 is not read, and one alone with scale 1 is returned as it is. Low-rank models are
    added as one product of their stacked factors, and what lies under several of them is read once.
    """
    first = base if base is not None else models[0]
    shape = stored(first).shape
    terms = [(model, scale) for model, scale in zip(models, scales, strict=True) if scale != 0.0]
    if base is None and len(terms) == 1 and terms[0][1] == 1.0 and isinstance(terms[0][0], Tensor):
        return terms[0][0]  # bit for bit, which 0 + x is not for the zero below zero
    under = _gathered([(stored(model), scale) for model, scale in terms])
    operands = [(Operand.of(t, base is not None), s) for t, s in under if base is None or not same(t, base)]
    if low := [(model, scale) for model, scale in terms if isinstance(model, LowRank)]:
        ups, downs = torch.cat([model.up * scale for model, scale in low], dim=1), torch.cat([m.down for m, _ in low])
        product = torch.mm(ups, downs, out=empty(shape, torch.float32))
        operands.append((Operand.of(product), 1.0))
    merged = empty(shape, dtype)
    origin = None if base is None else Operand.of(base)
    at, target, records = table([origin]), table([Operand.of(merged)]), table([operand for operand, _ in operands])
    records["scale"] = [scale for _, scale in operands]
    over_chunks(
        merged.numel(),
        lambda start, stop: fused.combine(records, at, target, False, False, 1.0, start, stop),
    )
    return merged


def _gathered(terms: Sequence[tuple[Tensor, float]]) -> list[tuple[Tensor, float]]:
    """The same terms, with those of one tensor put together."""
    unique: list[Tensor] = []
    for tensor, _ in terms:
        if not any(same(tensor, other) for other in unique):
            unique.append(tensor)
    return [(tensor, sum(scale for other, scale in terms if same(other, tensor))) for tensor in unique]


def _restored(inputs: TensorGroup, place: int, operand: Operand, mask: Mask, origin: Operand) -> float:
    """What to multiply a masked task vector by for the L1 norm it had.

    Where so little is left that the ratio means nothing (norms under 1e-7) nothing is scaled.
    """
    if mask.shares is not None and operand.size > fused.SHARES:
        seed = mask.fields["seed"]
        sums = inputs.keep(f"sums by share {seed}", place, lambda: _sums_by_share(operand, mask, origin))
        before, after = float(sums[-1]), float(sums[mask.shares - 1])
    else:
        before = inputs.keep("absolute sum", place, lambda: _absolute_sum(operand, None, origin))
        after = inputs.keep_latest("kept sum", place, mask.tag, lambda: _absolute_sum(operand, mask, origin))
    return before / after if min(before, after) >= 1e-7 else 1.0


def _absolute_sum(operand: Operand, mask: Mask | None, origin: Operand) -> float:
    """The L1 norm of what is kept of a task vector."""
    model, base = table([operand], [mask]), table([origin])
    sums = np.zeros(blocks_of(operand.size), np.float64)
    over_chunks(operand.size, lambda start, stop: fused.absolute_sums(model, base, start, stop, sums))
    return math.fsum(sums)  # exact, so it does not depend on how the blocks were shared out


SUMMED = 1 << 22
"""Entries that are summed up one after another: the same parts, and so the same bits, on any number of threads."""


def _sums_by_share(operand: Operand, mask: Mask, origin: Operand) -> NDArray[np.float64]:
    """The L1 norms of what a random mask keeps of a task vector at each density of a whole number of shares."""
    model, base, size = table([operand], [mask]), table([origin]), operand.size

    def part(starts: range) -> list[NDArray[np.float64]]:
        sums = np.zeros((len(starts), fused.SHARES), np.float64)
        for row, start in zip(sums, starts, strict=True):
            fused.sums_by_share(model, base, start, min(start + SUMMED, size), row)
        return [*sums]

    return np.cumsum(np.sum(in_parts(range(0, size, SUMMED), part), axis=0))
