"""The input of a merge method: the tensors of one name, the values of its parameters, and a cache."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from llmevo.models.checkpoints import LowRank, Weight, same

Value = TypeVar("Value")


class Cache:
    """Arrays and numbers that are the same for all candidates, kept within a limit of memory; see `latest` for more.

    The first entries stay: candidates go over all tensors in the same order, so a cache that dropped the oldest entry
    for the newest would never have the one that is needed next.
    """

    def __init__(self, limit: float) -> None:
        """`limit` in bytes; 0 keeps numbers only."""
        self.limit = limit
        self.used = 0
        """Bytes of the kept arrays."""
        self._values: dict[Hashable, Any] = {}
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value under `key`, made now if it is not kept; a value without `nbytes` counts as 0 bytes."""
        if key in self._values:
            return self._values[key]
        value = make()
        with self._lock:
            if self.used + _size(value) <= self.limit:
                self.used += _size(value)
                self._values[key] = value
        return value

    def latest(self, key: Hashable, tag: Hashable, make: Callable[[], Value]) -> Value:
        """Like `get` for a value that depends on genes: only that of the last `tag` is kept.

        It is kept beyond the limit unless that is 0: singular vectors take minutes to make, and a merge seconds.
        """
        held = self._values.get(key)
        if held is not None and held[0] == tag:
            return held[1]
        value = make()
        if self.limit or not _size(value):
            self._values[key] = (tag, value)
        return value


def _size(value: object) -> int:
    return int(getattr(value, "nbytes", 0))


@dataclass(frozen=True)
class TensorGroup:
    """The input of a method: the tensors of one name.

    Weights come as they are stored; arithmetic on them is float32. Methods on task vectors subtract `base` themselves,
    block by block: two 16-bit reads cost less than keeping the difference in 32 bits.
    """

    base: Tensor | None
    """The base model's tensor; None when the recipe has no base model."""
    models: Sequence[Weight]
    """One weight a model, without the base where the method takes it as the origin."""
    each: Mapping[str, Sequence[float]]
    """Per-model parameters: one value for every entry of `models`."""
    shared: Mapping[str, float]
    """Parameters of the whole merge."""
    seeds: Sequence[int]
    """One seed for every entry of `models`, made of the run's seed, the tensor's name and the model's name:
    random masks depend on nothing else, so a scored and an exported merge agree bit for bit."""
    dtype: torch.dtype = torch.float32
    """The type of the result, to which a method may round, once; or it may return float32."""
    keys: Sequence[Hashable] = ()
    """A key of each model's task vector for the cache; empty when nothing is to be kept."""
    cache: Cache = field(default_factory=lambda: Cache(0))

    def keep(self, what: str, make: Callable[[], Value], model: int | None = None) -> Value:
        """Return a value that depends on one model's weight (and the base), or on all weights, and on no gene."""
        return self.cache.get((what, self._key(model)), make) if self.keys else make()

    def keep_latest(self, what: str, tag: Hashable, make: Callable[[], Value], model: int | None = None) -> Value:
        """Like `keep` for a value that depends on a gene's value, `tag`: the last one is kept."""
        return self.cache.latest((what, self._key(model)), tag, make) if self.keys else make()

    def _key(self, model: int | None) -> Hashable:
        return tuple(self.keys) if model is None else self.keys[model]

    @property
    def origin(self) -> Tensor:
        """The base's tensor, where the method needs one."""
        assert self.base is not None
        return self.base

    def weight(self, model: int) -> Tensor:
        """Return one model's weight as a whole float32 tensor; do not write into it."""
        weight = self.models[model]
        return weight.dense() if isinstance(weight, LowRank) else weight.float()

    def delta(self, model: int) -> Tensor:
        """Return one model's task vector, its weight minus the base's, in float32; do not write into it."""
        weight = self.models[model]
        if isinstance(weight, LowRank) and same(weight.origin, self.origin):
            return self.keep("delta", lambda: weight.up @ weight.down, model)
        return self.weight(model) - self.origin.float()


class Merge(Protocol):
    """The arithmetic of a method: inputs in, the merged tensor out, new or one of the inputs.

    Raises CandidateError for incompatible parameters, FloatingPointError for a weight that is not finite.
    """

    def __call__(self, inputs: TensorGroup) -> Tensor: ...


LEAST_DIVISOR = 1e-8
"""Weights whose sum is smaller than this are not divided by it, as in mergekit."""


def divisor(weights: Sequence[float]) -> float:
    """Return Σ wᵢ for normalizing, or 1 when the weights cancel out (see `LEAST_DIVISOR`)."""
    total = float(sum(weights))
    return total if abs(total) >= LEAST_DIVISOR else 1.0


def coefficients(each: Mapping[str, Sequence[float]], shared: Mapping[str, float]) -> list[float]:
    """Return the factor of each model in a weighted sum, from `weight`, `normalize` and `lambda`."""
    weights = each["weight"]
    scale = shared.get("lambda", 1.0) / (divisor(weights) if shared["normalize"] else 1.0)
    return [weight * scale for weight in weights]
