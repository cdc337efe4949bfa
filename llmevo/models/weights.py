"""One weight of one model: a stored tensor, or a low-rank change of one."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A weight that is another one plus the product of two small factors, as a LoRA adapter makes it."""

    origin: Tensor
    """The weight under the adapter, as it is stored."""
    up: Tensor
    """(rows, rank), float32."""
    down: Tensor
    """(rank, columns), float32, with the adapter's scale in it."""

    def dense(self) -> Tensor:
        """The weight itself, float32."""
        return torch.addmm(self.origin.float(), self.up, self.down)


Weight = Tensor | LowRank
"""One model's weight: as it is stored, or low-rank over another one."""


def stored(weight: Weight) -> Tensor:
    """The tensor that a weight is, or lies over."""
    return weight.origin if isinstance(weight, LowRank) else weight


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are one and the same memory, as a base is that two models share."""
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape
