"""What a merge method computes with: the tensors of one name, stored or low-rank, and its parameters' values."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from llmevo.merging.cache import Cache
from llmevo.models.weights import LowRank, Weight, same

Value = TypeVar("Value")


@dataclass(frozen=True)
class TensorGroup:
    """Everything a method needs to merge the tensors of one name.

    Weights come as they are stored; arithmetic on them is float32. Methods on task vectors subtract `base` themselves,
    block by block: two 16-bit reads cost less than keeping the difference in 32 bits.
    """

    base: Tensor | None
    """The base model's tensor; None when the recipe has no base model."""
    models: Sequence[Weight]
    """One weight a model, the base not among them where the method takes it as the origin."""
    each: Mapping[str, Sequence[float]]
    """Per-model parameters: one value for every entry of `models`."""
    shared: Mapping[str, float]
    """Parameters of the whole merge."""
    seeds: Sequence[int]
    """One seed for every entry of `models`, made of the run's seed, the tensor's name and the model's name:
    random masks depend on nothing else, so a scored and an exported merge agree bit for bit."""
    dtype: torch.dtype = torch.float32
    """The type of the result, which a method may round to, once; or it may return float32."""
    keys: Sequence[Hashable] = ()
    """What tells each model's task vector from all others, for the cache; empty when nothing is to be kept."""
    cache: Cache = field(default_factory=lambda: Cache(0))

    def keep(self, what: str, model: int, make: Callable[[], Value]) -> Value:
        """Something that depends on one model's weight (and the base) and on no gene, from the cache if it is there."""
        return self.cache.get((what, self.keys[model]), make) if self.keys else make()

    def keep_all(self, what: str, make: Callable[[], Value]) -> Value:
        """Something that depends on all weights and on no gene, from the cache if it is there."""
        return self.cache.get((what, tuple(self.keys)), make) if self.keys else make()

    def keep_latest(self, what: str, model: int, tag: Hashable, make: Callable[[], Value]) -> Value:
        """Something that depends on a gene's value, `tag`: the last one is kept, for genes that rest."""
        return self.cache.latest((what, self.keys[model]), tag, make) if self.keys else make()

    def keep_latest_of_all(self, what: str, tag: Hashable, make: Callable[[], Value]) -> Value:
        """Like `keep_latest` for something that depends on all weights."""
        return self.cache.latest((what, tuple(self.keys)), tag, make) if self.keys else make()

    @property
    def origin(self) -> Tensor:
        """The base's tensor, where the method needs one."""
        assert self.base is not None
        return self.base

    def weight(self, model: int) -> Tensor:
        """One model's weight as a whole float32 tensor; do not write into it."""
        weight = self.models[model]
        return weight.dense() if isinstance(weight, LowRank) else weight.float()

    def delta(self, model: int) -> Tensor:
        """One model's task vector as a whole float32 tensor: its weight minus the base's; do not write into it."""
        weight = self.models[model]
        if isinstance(weight, LowRank) and same(weight.origin, self.origin):
            return self.keep("delta", model, lambda: weight.up @ weight.down)
        return self.weight(model) - self.origin.float()


class Merge(Protocol):
    """The arithmetic of a method: inputs in, the merged tensor out, new or one of the inputs.

    Raises CandidateError for parameters that make no sense together, FloatingPointError where a weight is not finite.
    """

    def __call__(self, inputs: TensorGroup) -> Tensor: ...


LEAST_DIVISOR = 1e-8
"""Weights whose sum is smaller than this are not divided by it, as in mergekit."""


def divisor(weights: Sequence[float]) -> float:
    """Σ wᵢ for normalizing; 1 when the weights cancel out (see `LEAST_DIVISOR`)."""
    total = float(sum(weights))
    return total if abs(total) >= LEAST_DIVISOR else 1.0
