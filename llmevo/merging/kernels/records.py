"""What the fused kernels are given: a record for each model's tensor, with what is kept of it."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmevo.merging.kernels import fused
from llmevo.merging.kernels.blocks import Operand, in_parts


@dataclass(frozen=True)
class Mask:
    """What is kept of a task vector, as fields of a `fused.MODEL` record."""

    fields: Mapping[str, Any]
    held: Sequence[Any] = field(default=())
    """Arrays whose addresses are among the fields."""
    shares: int | None = None
    """Of a random mask that keeps a whole number of `fused.SHARES`: that number."""

    @property
    def tag(self) -> Hashable:
        """What tells this mask of a task vector from others of the same one."""
        return tuple(value for name, value in self.fields.items() if name != "ranks")


FIELDS: tuple[str, ...] = fused.MODEL.names or ()

EMPTY = (0,) * len(FIELDS)

NOTHING = Mask({"mask": fused.KEEP_NONE})


def random_mask(seed: int, density: float, inverse: bool) -> Mask:
    """Keep each entry with probability `density`, with `inverse` divided by it; seed and place alone decide."""
    shares = round(density * fused.SHARES)
    whole = math.isclose(shares, density * fused.SHARES, rel_tol=1e-9)
    below = -(-(shares << 32) // fused.SHARES) if whole else math.ceil(density * 2**32)
    fields = {"mask": fused.DROP, "seed": seed, "threshold": below, "lowest": density, "inverse": inverse}
    return Mask(fields, shares=shares if whole else None)


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


def table(operands: Sequence[Operand | None], masks: Sequence[Mask | None] = ()) -> NDArray[Any]:
    """The `fused.MODEL` records of some models; they hold addresses, so the operands have to outlive them."""
    return np.array([_record(operand, mask) for operand, mask in zip_longest(operands, masks)], fused.MODEL)


def _record(operand: Operand | None, mask: Mask | None) -> tuple[Any, ...]:
    if operand is None:
        return EMPTY
    weight = operand.weight
    stored = fused.BFLOAT16 if weight.dtype == torch.bfloat16 else fused.FLOAT32
    rest = EMPTY[3:] if mask is None else tuple(mask.fields.get(name, 0) for name in FIELDS[3:])
    return (weight.data_ptr(), stored, operand.less_base, *rest)


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
    operand = Operand.of(tensor)
    records = table([operand])
    return all(over_chunks(operand.size, lambda start, stop: fused.finite(records, start, stop)))
