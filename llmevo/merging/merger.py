"""The merge: a recipe and the models' weights in, the merged weights out, one at a time.

One generator with two sinks, the engine and the exporter: what was scored is what is saved, bit for bit.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce

import torch
from torch import Tensor

from llmevo.errors import CandidateError
from llmevo.merging.cache import Cache
from llmevo.merging.kernels.blocks import in_background
from llmevo.merging.kernels.records import is_finite
from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.methods.method import Method
from llmevo.merging.plan import Step, plan
from llmevo.merging.recipe import Recipe
from llmevo.models.checkpoints import Sources
from llmevo.models.references import ModelReference
from llmevo.models.weights import LowRank, Weight, same, stored

Seed = int | Callable[[str, ModelReference], int]
"""What random masks follow from: a run's seed, or the seed of each mask by tensor and model."""

AHEAD = 4
"""Pieces of work that are begun before they are asked for."""

TOGETHER = 1 << 21
"""Entries that are one piece of work. A larger tensor is one by itself, and all cores work on it."""


class Merger:
    """Merges recipes of one set of sources; use one for all candidates of a run.

    It remembers what no gene changes (norms, angles, magnitudes, ranks) within a limit of memory. Arithmetic is done on
    the processor whatever the engine's device: the same bits everywhere.
    """

    def __init__(self, sources: Sources, seed: Seed = 0, cache_gb: float = 0.0) -> None:
        """`seed` decides the random masks of the methods that have them; `cache_gb` is in 10⁹ bytes."""
        self.sources, self.seed = sources, seed
        self.cache = Cache(cache_gb * 1e9)

    def merge(self, recipe: Recipe, loaded: dict[str, str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, merged weight) for every tensor of the result.

        Arithmetic is float32, rounded once to `out_dtype`, or `dtype`, or the widest of the sources' types. A tensor
        nobody changed comes as a mapped view of its source: do not write into it. `loaded` tells how each weight was
        made that the consumer holds already: those that would be made the same way are left out, and it is brought
        up to date when the consumer asks for the next one. Raises CandidateError when a merged weight is not finite.
        """
        ahead: deque[tuple[list[Planned], Callable[[], list[Tensor]]]] = deque()

        def next_ones() -> Iterator[tuple[str, Tensor]]:
            planned, results = ahead.popleft()
            for (step, parts), result in zip(planned, results(), strict=True):
                if loaded is not None:
                    loaded.pop(step.name, None)
                yield step.name, result
                if loaded is not None:
                    loaded[step.name] = parts.digest

        # Products of adapters are torch's work, which has threads of its own.
        side_by_side = not any(reference.lora for reference in recipe.references)
        for planned, size in self._pieces(recipe, loaded or {}, TOGETHER if side_by_side else 0):
            work = partial(self._merged_all, planned)
            ahead.append((planned, in_background(work) if side_by_side and size <= TOGETHER else work))
            if len(ahead) > AHEAD:
                yield from next_ones()
        while ahead:
            yield from next_ones()

    def _pieces(
        self, recipe: Recipe, loaded: Mapping[str, str], together: int
    ) -> Iterator[tuple[list["Planned"], int]]:
        """What is to be merged anew, and its entries: consecutive tensors of `together` at most, or a single one."""
        donor = self.sources[recipe.donor]
        piece: list[Planned] = []
        size = 0
        for step, parts in self._plan(recipe):
            if step.name in loaded and loaded[step.name] == parts.digest:
                continue
            entries = donor.tensor(step.inputs[0]).numel()
            if piece and size + entries > together:
                yield piece, size
                piece, size = [], 0
            piece.append((step, parts))
            size += entries
        if piece:
            yield piece, size

    def _merged_all(self, planned: Sequence["Planned"]) -> list[Tensor]:
        return [self._merged(step, parts) for step, parts in planned]

    def digests(self, recipe: Recipe) -> dict[str, str]:
        """How each tensor of the result is made: what `loaded` says of it after `merge`."""
        return {step.name: parts.digest for step, parts in self._plan(recipe)}

    def _plan(self, recipe: Recipe) -> Iterator["Planned"]:
        donor = self.sources[recipe.donor]
        wanted = recipe.out_dtype or recipe.dtype
        dtype: torch.dtype | None = getattr(torch, wanted) if wanted else None
        for step in plan(recipe, [*donor.shapes], self.sources.depth(recipe.donor)):
            yield step, self._parts(recipe, step, dtype or self._widest(step))

    def _widest(self, step: Step) -> torch.dtype:
        """The type that holds all of the sources' types, as they are stored."""
        sources = zip(step.of.sources, step.inputs, strict=True)
        weights = (stored(self.sources[source.model].weight(name)) for source, name in sources)
        return reduce(torch.promote_types, (weight.dtype for weight in weights))

    def count(self, recipe: Recipe) -> "Tensors":
        """What a merge of the recipe does with every tensor of the models; reads no weights but maps them."""
        sources, copied = self.sources, 0
        steps = [*self._plan(recipe)]
        for _, parts in steps:
            models = [sources[model].weight(name) for model, name in parts.models]
            copied += self._unchanged(parts, models) is not None
        used = {name for step, _ in steps for name in step.inputs}
        unused = {name for name in sources[recipe.donor].shapes if name not in used}
        unused |= {name for reference in recipe.references for name in sources[reference].derived}
        return Tensors(len(steps) - copied, copied, sorted(unused))

    def _unchanged(self, parts: "_Parts", models: Sequence[Weight]) -> Tensor | None:
        """The first model's tensor, where it is copied: it holds no floating-point numbers, or no model changes it."""
        base = self.sources[parts.base[0]].tensor(parts.base[1]) if parts.base else None
        first = base if base is not None else stored(models[0])
        unchanged = base is not None and all(isinstance(m, Tensor) and same(m, base) for m in models)
        return first if unchanged or not first.is_floating_point() else None

    def rounding_loss(self, recipe: Recipe, tensors: int = 12) -> float:
        """The share of what a merge changes that rounding to the result's type loses: ‖rounded - x‖ / ‖x - base‖.

        Use it before a search: above a half, most of what the genes tune is noise. Looks at some `tensors` of the
        layers, evenly spread; 0 when the merge changes nothing. A model without a base is compared with its donor.
        """
        donor = self.sources[recipe.donor]
        planned = [(step, parts) for step, parts in self._plan(recipe) if step.layer]
        lost = changed = 0.0
        for step, parts in planned[:: max(1, len(planned) // tensors)]:
            origin = donor.tensor(step.base)
            if not origin.is_floating_point():
                continue
            exact = self._merged(step, replace(parts, dtype=torch.float32))
            lost += float((exact.to(parts.dtype).float() - exact).square().sum())
            changed += float((exact - origin.float()).square().sum())
        return math.sqrt(lost / changed) if changed else 0.0

    def _parts(self, recipe: Recipe, step: Step, dtype: torch.dtype) -> "_Parts":
        """What one tensor is made of."""
        method = recipe.method_of(step.of)
        each, shared = recipe.values(step.of, step.name, step.depth, step.inputs)
        base = recipe.origin_of(step.of)
        places = [i for i, source in enumerate(step.of.sources) if base is None or source.model != base]
        return _Parts(
            method=method,
            base=(base, step.base) if base else None,
            models=[(step.of.sources[i].model, step.inputs[i]) for i in places],
            each={name: [values[i] for i in places] for name, values in each.items()},
            shared=shared,
            dtype=dtype,
        )

    def _merged(self, step: Step, parts: "_Parts") -> Tensor:
        """One tensor, rounded to its type. Raises CandidateError when it is not finite."""
        try:
            merged = self._combined(step, parts)
        except CandidateError as error:
            raise CandidateError(f"{parts.method.name}: {step.name}: {error}") from error
        except FloatingPointError:
            merged = None
        if merged is not None and not merged.is_floating_point():
            return merged
        if merged is None or not is_finite(rounded := _as(parts.dtype, merged)):
            raise CandidateError(f"{parts.method.name}: the merged {step.name} is not finite (NaN or infinite)")
        return rounded

    def _combined(self, step: Step, parts: "_Parts") -> Tensor:
        """One tensor as its method makes it; as it is stored when the models do not differ in it."""
        sources = self.sources
        if (copied := _copied(parts.method, parts.each, parts.shared)) is not None:
            model, name = parts.models[copied]
            return sources[model].tensor(name)
        used = parts.each.get("weight", [1.0] * len(parts.models))
        read = [of for of, weight in zip(parts.models, used, strict=True) if weight != 0.0]
        for model, name in [*read, *([parts.base] if parts.base else [])]:
            self._look_through(model, name)
        models = [sources[model].weight(name) for model, name in parts.models]
        if (unchanged := self._unchanged(parts, models)) is not None:
            return unchanged
        return parts.method.merge(
            TensorGroup(
                sources[parts.base[0]].tensor(parts.base[1]) if parts.base else None,
                models,
                parts.each,
                parts.shared,
                seeds=[seed_of(self.seed, step.name, model) for model, _ in parts.models],
                dtype=parts.dtype,
                keys=[(parts.base, *made_of) for made_of in parts.models],
                cache=self.cache,
            )
        )

    def _look_through(self, model: ModelReference, name: str) -> None:
        """Once for each weight of a source: trimming would drop unseen what is no number."""
        weight = self.sources[model].weight(name)
        if not self.cache.get(("finite", model, name), lambda: all(map(is_finite, _tensors(weight)))):
            raise CandidateError(
                f"in {model} it is not finite (NaN or infinite); download the model again, or leave it out"
            )


@dataclass(frozen=True)
class _Parts:
    """What one tensor is made of, and how: all that decides its bits but the sources and the seed."""

    method: Method
    base: tuple[ModelReference, str] | None
    """The model that is the origin, and the tensor's name there."""
    models: Sequence[tuple[ModelReference, str]]
    each: Mapping[str, Sequence[float]]
    shared: Mapping[str, float]
    dtype: torch.dtype

    @cached_property
    def digest(self) -> str:
        models = [(str(model), name) for model, name in self.models]
        base = self.base and (str(self.base[0]), self.base[1])
        return repr((self.method.name, base, models, {**self.each}, {**self.shared}, str(self.dtype)))


@dataclass(frozen=True)
class Tensors:
    """What becomes of the models' tensors in a merge; a tensor that only some models have is an error, and not here."""

    merged: int
    """Made by the merge method."""
    copied: int
    """Taken from the base, or the first model: they hold integers, or no adapter changes them."""
    left_out: Sequence[str]
    """In the models and not in the result: the config determines them, transformers does not use them (layers for
    multi-token prediction), or the recipe's slices leave their layers out."""


Planned = tuple[Step, _Parts]
"""One tensor of the result and what it is made of."""


def merge(recipe: Recipe, sources: Sources, seed: Seed = 0) -> Iterator[tuple[str, Tensor]]:
    """Merge one recipe; see `Merger.merge`."""
    return Merger(sources, seed).merge(recipe)


def not_finite(sources: Sources, models: Iterable[ModelReference]) -> str:
    """Which models have weights that are NaN or infinite, and where; empty when there are none. Reads all weights."""
    found: list[str] = []
    for model in models:
        source = sources[model]
        wrong = [name for name in source.shapes if not all(map(is_finite, _tensors(source.weight(name))))]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        if wrong:
            found.append(f"{model} has weights that are not finite (NaN or infinite): {', '.join(wrong[:3])}{more}")
    return f"{'; '.join(found)}. Candidates fail with it: download the model again, or leave it out" if found else ""


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _tensors(weight: Weight) -> list[Tensor]:
    """The floating-point tensors that a weight consists of."""
    tensors = [weight.origin, weight.up, weight.down] if isinstance(weight, LowRank) else [weight]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _copied(method: Method, each: Mapping[str, Sequence[float]], shared: Mapping[str, float]) -> int | None:
    """The place of the one model that the merge is a copy of, if it is: it has weight 1, all others have 0.

    Such a merge is that model bit for bit, which base + (model - base) is not in floating point.
    """
    if method.name == "slerp":
        return 0 if shared["t"] == 1.0 else None
    weights = each.get("weight", [])
    used = [place for place, weight in enumerate(weights) if weight != 0.0]
    if len(used) != 1:
        return None
    whole = (weights[used[0]], each["density"][used[0]] if "density" in each else 1.0, shared.get("lambda", 1.0))
    return used[0] if whole == (1.0, 1.0, 1.0) else None


def seed_of(seed: Seed, tensor: str, model: ModelReference) -> int:
    """The seed of one model's random mask of one tensor: from the run's seed and the names, nothing else."""
    if not isinstance(seed, int):
        return seed(tensor, model)
    digest = hashlib.blake2b(f"{seed}/{tensor}/{model}".encode(), digest_size=8).digest()
    return int.from_bytes(digest)
