"""What a merge method is: a pure function on the tensors of one name, and its parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method, as it may stand in a recipe.

    A parameter with `low` and `high` is a gene: the search may set it anywhere between them.
    """

    default: float | bool | None
    """Its value when the recipe is silent; None means it has to be given."""
    low: float | None = None
    high: float | None = None

    @property
    def is_gene(self) -> bool:
        return self.low is not None


@dataclass(frozen=True)
class LowRank:
    """A task vector that is the product of two small factors, as a LoRA adapter has it; float32."""

    up: Tensor
    """(rows, rank)."""
    down: Tensor
    """(rank, columns), with the adapter's scale in it."""

    def dense(self) -> Tensor:
        return self.up @ self.down


Delta = Tensor | LowRank
"""A task vector, or without a base a weight."""


def dense(delta: Delta) -> Tensor:
    """As one tensor, for arithmetic that needs every entry."""
    return delta.dense() if isinstance(delta, LowRank) else delta


@dataclass(frozen=True)
class Inputs:
    """Everything a method needs to merge the tensors of one name."""

    base: Tensor | None
    """The base model's tensor, float32; None when the recipe has no base model."""
    tensors: Sequence[Delta]
    """One float32 tensor a model: its task vector (model minus base) where the method `takes_base`, else its weight."""
    each: Mapping[str, Sequence[float]]
    """Per-model parameters: one value for every entry of `tensors`."""
    shared: Mapping[str, float]
    """Parameters of the whole merge."""
    seeds: Sequence[int]
    """One seed for every entry of `tensors`, made of the run's seed, the tensor's name and the model's place:
    random masks depend on nothing else, so a scored and an exported merge agree bit for bit."""

    def generator(self, model: int) -> torch.Generator:
        """A fresh random generator for one model's mask of this tensor."""
        return torch.Generator().manual_seed(self.seeds[model])


class Merge(Protocol):
    """The arithmetic of a method: inputs in, the merged float32 tensor out."""

    def __call__(self, inputs: Inputs) -> Tensor: ...


@dataclass(frozen=True)
class Method:
    """A merge method: its arithmetic, its parameters and where they come from."""

    name: str
    """As in mergekit's `merge_method`."""
    merge: Merge
    paper: str
    each: Mapping[str, Parameter]
    """Parameters every model has its own value of."""
    shared: Mapping[str, Parameter] = field(default_factory=dict[str, Parameter])
    """Parameters of the whole merge."""
    takes_base: bool = False
    """Whether the base model is the origin of task vectors (and so must be given) or a model like the others."""
    pair: bool = False
    """Whether it merges exactly two models, the base and another."""
    normalize: bool | None = None
    """mergekit-evolve's default of `normalize` for this method; None when it has no such parameter."""


def weighted_sum(tensors: Sequence[Delta], weights: Sequence[float], start: Tensor | None = None) -> Tensor:
    """`start` + Σ wᵢ·xᵢ in float32, as one new tensor; inputs are not changed.

    A tensor whose weight is exactly 0 is not read. Low-rank task vectors stay low-rank: all of them are added in
    one matrix product over their stacked factors.
    """
    terms = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight != 0.0]
    low = [(tensor, weight) for tensor, weight in terms if isinstance(tensor, LowRank)]
    full = [(tensor, weight) for tensor, weight in terms if not isinstance(tensor, LowRank)]
    if low:
        up = torch.cat([tensor.up * weight for tensor, weight in low], dim=1)
        down = torch.cat([tensor.down for tensor, _ in low])
        total = up @ down if start is None else torch.addmm(start, up, down)
    elif start is not None:
        total = start.clone()
    else:
        total = torch.zeros_like(dense(tensors[0]))
    for tensor, weight in full:
        total.add_(tensor, alpha=weight)
    return total


def divisor(weights: Sequence[float]) -> float:
    """Σ wᵢ for normalizing; 1 when the sum is so near 0 that dividing by it would only blow up noise."""
    total = float(sum(weights))
    return total if abs(total) >= 1e-8 else 1.0
