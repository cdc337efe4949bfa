"""The merge: a recipe and the models' weights in, the merged weights out, one at a time.

One generator with two sinks, the engine and the exporter: the scored weights are saved bit for bit.
"""

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmevo.errors import CandidateError, RecipeError, SourceError, UserError, plural
from llmevo.merging.kernels.blocks import in_background
from llmevo.merging.kernels.task_vectors import is_finite, is_finite_weight
from llmevo.merging.methods.base import Cache, TensorGroup
from llmevo.merging.methods.registry import METHODS, Method
from llmevo.merging.mixture.classes import SHARED, Matrix, MixtureClass, class_of, matrices
from llmevo.merging.mixture.mixture import Mixture
from llmevo.merging.mixture.router import Router, read
from llmevo.merging.plan import Step, plan
from llmevo.merging.preparation.prepared import Prepared
from llmevo.merging.recipe import Recipe
from llmevo.models.architecture import PROJECTIONS, experts_of, is_stack_of_experts, text_config
from llmevo.models.checkpoints import LowRank, Weight, same, stored, widest
from llmevo.models.gains import Branches, Fold
from llmevo.models.quantize import Quantizer, quantizer
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources

Seed = int | Callable[[str, ModelReference], int]
"""The source of random masks: a run's seed, or the seed of each mask by tensor and model."""

AHEAD = 4
"""Pieces of work that are started before their results are needed."""

TOGETHER = 1 << 21
"""Entries of one piece of work. A larger tensor is a piece by itself, and all cores work on it."""

MASKS_FILE = "masks.json"


@dataclass(frozen=True)
class _PlannedTensor:
    """One tensor of the result, with all that determines its bits besides the sources and the seed."""

    step: Step
    method: Method
    base: tuple[ModelReference, str] | None
    """The model that is the origin, and the tensor's name there."""
    models: Sequence[tuple[ModelReference, str]]
    each: Mapping[str, Sequence[float]]
    shared: Mapping[str, float]
    dtype: torch.dtype
    rounding: Quantizer | None = None
    """The rounding of the merged weight; None where it keeps its type."""
    fold: Fold | None = None
    """The gain of the layer's branch, folded into the merged weight before it is rounded."""
    experts: bool = False
    """Whether it holds a matrix of every expert, which are merged one by one: what methods measure of a tensor (norms,
    ranks, angles) is then that of one expert, as in checkpoints with a tensor for each."""
    prepared: Prepared | None = None
    """The models after a preparation; None where it has no part in the tensor."""
    share: float = 0.0
    """The way from the models as they are to the prepared ones."""
    given: "_Given | None" = None
    """What the tensor is, where no model has it: a router of a mixture."""
    masked_as: str = ""
    """The name by which random masks are drawn, where it is not the tensor's own: copies of one merge have one mask."""

    @property
    def mask_name(self) -> str:
        return self.masked_as or self.step.name

    @cached_property
    def digest(self) -> str:
        """Equal for tensors with equal bits, in whichever layers."""
        models = [(str(model), name) for model, name in self.models]
        base = self.base and (str(self.base[0]), self.base[1])
        made = (self.method.name, base, models, {**self.each}, {**self.shared}, str(self.dtype))
        # The name where the bits depend on it: random masks are drawn by name, and formats differ by name.
        named = self.mask_name if self.method.random or self.rounding else None
        given = self.given and self.given.digest
        return repr((*made, *filter(None, (self.rounding, self.fold, named, *self.preparation, given))))

    @property
    def preparation(self) -> tuple[str, float] | tuple[()]:
        """What distinguishes the models' weights from those without a preparation."""
        return (self.prepared.digest, self.share) if self.prepared else ()

    @property
    def copied(self) -> tuple[ModelReference, str] | None:
        """The one model that the merge is a copy of, if it is: it has weight 1, all others have 0.

        Such a merge is that model bit for bit, which base + (model - base) is not in floating point.
        """
        if self.method.name == "slerp":
            return self.models[0] if self.shared["t"] == 1.0 else None
        weights = self.each.get("weight", [])
        used = [place for place, weight in enumerate(weights) if weight != 0.0]
        if len(used) != 1:
            return None
        density = self.each["density"][used[0]] if "density" in self.each else 1.0
        is_copy = weights[used[0]] == density == self.shared.get("lambda", 1.0) == 1.0
        return self.models[used[0]] if is_copy else None


@dataclass(frozen=True)
class _Given:
    """A tensor of a mixture that no model has: a router's, or one of an expert that adds 0."""

    digest: str
    make: Callable[[], Tensor]
    shape: tuple[int, ...]


def _of_model(tensor: _PlannedTensor, model: ModelReference, scale: float = 1.0) -> _PlannedTensor:
    """Return the tensor as one model has it, times a number."""
    alone = {"method": METHODS["linear"], "each": {"weight": [1.0]}, "shared": {"normalize": 1.0}}
    scaled = {"method": METHODS["passthrough"], "each": {"scale": [scale]}, "shared": {}}
    given: Mapping[str, Any] = alone if scale == 1.0 else scaled
    models = [(model, tensor.step.inputs[0])]
    return replace(tensor, **given, base=None, models=models, fold=None, prepared=None, share=0.0)


Reasons = Mapping[str, Sequence[str]]
"""{reason: the names of the tensors}."""


@dataclass(frozen=True)
class TensorCounts:
    """The tensors of a merge: every one of the result is merged or copied, every other one of a model is left out."""

    merged: int
    """Made by the merge method."""
    copied: Reasons
    """Taken as they are from the base, or the first model."""
    left_out: Reasons
    """In a model and not in the result."""

    def __str__(self) -> str:
        parts = [f"{_number(of)} {how}{_shown(of)}" for how, of in self.unmerged.items()]
        return f"{self.merged} merged, {', '.join(parts)}"

    @property
    def unmerged(self) -> Mapping[str, Reasons]:
        return {"copied": self.copied, "left out": self.left_out}


def _number(reasons: Reasons) -> int:
    return sum(map(len, reasons.values()))


def _shown(reasons: Reasons) -> str:
    """Return the reasons, with the number of tensors where there are several, in brackets; empty without any."""
    said = [f"{len(names)} {reason}" if len(reasons) > 1 else reason for reason, names in reasons.items()]
    return f" ({'; '.join(said)})" if said else ""


class Merger:
    """Merges recipes of one set of sources; use one for all candidates of a run.

    It remembers values that depend on no gene (norms, angles, magnitudes, ranks) within a limit of memory. Arithmetic
    runs on the CPU whatever the engine's device: the same bits everywhere.
    """

    def __init__(self, sources: Sources, seed: Seed = 0, cache_gb: float = 0.0) -> None:
        """`seed` determines the random masks of the methods that have them; `cache_gb` is in 10⁹ bytes."""
        self.sources, self.seed = sources, seed
        self.cache = Cache(cache_gb * 1e9)
        self._experts: dict[ModelReference, int] = {}
        self._prepared: dict[str, Prepared] = {}

    def merge(
        self, recipe: Recipe, loaded: dict[str, str] | None = None, quantize: str = ""
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, merged weight) for every tensor of the result.

        Arithmetic is float32, rounded once to `out_dtype`, or `dtype`, or the widest of the sources' types. A tensor
        that no model changes comes as a mapped view of its source: do not write into it. `loaded` has the digest of
        each weight that the consumer holds already: weights with the same digest are not yielded, and `loaded` is
        updated when the consumer asks for the next one. With `quantize`, a format of `models.quantize`, the weights
        are those that a server reads from a file of that format, in the same type. Raises CandidateError when a merged
        weight is not finite.
        """
        ahead: deque[tuple[list[_PlannedTensor], Callable[[], list[Tensor]]]] = deque()

        def next_ones() -> Iterator[tuple[str, Tensor]]:
            planned, results = ahead.popleft()
            for tensor, result in zip(planned, results(), strict=True):
                if loaded is not None:
                    loaded.pop(tensor.step.name, None)
                yield tensor.step.name, result
                if loaded is not None:
                    loaded[tensor.step.name] = tensor.digest

        # torch multiplies the factors of adapters, with threads of its own.
        side_by_side = not any(reference.lora for reference in recipe.references)
        for planned, size in self._pieces(recipe, loaded or {}, TOGETHER if side_by_side else 0, quantize):
            work = partial(list, map(self._merged, planned))
            ahead.append((planned, in_background(work) if side_by_side and size <= TOGETHER else work))
            if len(ahead) > AHEAD:
                yield from next_ones()
        while ahead:
            yield from next_ones()

    def _pieces(
        self, recipe: Recipe, loaded: Mapping[str, str], together: int, quantize: str
    ) -> Iterator[tuple[list[_PlannedTensor], int]]:
        """Yield consecutive tensors to be merged, of `together` entries at most or a single one, and their entries."""
        donor = self.sources[recipe.donor]
        piece: list[_PlannedTensor] = []
        size = 0
        for tensor in self._plan(recipe, quantize):
            if loaded.get(tensor.step.name) == tensor.digest:
                continue
            entries = math.prod(donor.shapes[tensor.step.inputs[0]])
            if piece and size + entries > together:
                yield piece, size
                piece, size = [], 0
            piece.append(tensor)
            size += entries
        if piece:
            yield piece, size

    def digests(self, recipe: Recipe, quantize: str = "") -> dict[str, str]:
        """Return the digest of each tensor of the result, the values of `loaded` after `merge`."""
        return {tensor.step.name: tensor.digest for tensor in self._plan(recipe, quantize)}

    def shapes(self, recipe: Recipe) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the result, in its order."""
        donor = self.sources[recipe.donor].shapes
        return {
            of.step.name: of.given.shape if of.given else donor[of.step.inputs[0]]
            for of in self._plan(unprepared(recipe))
        }

    def _plan(self, recipe: Recipe, quantize: str = "") -> Iterator[_PlannedTensor]:
        planned = self._plan_dense(recipe, quantize)
        return self._plan_mixture(recipe, recipe.mixture, planned) if recipe.mixture else planned

    def _plan_mixture(
        self, recipe: Recipe, mixture: Mixture, dense: Iterator[_PlannedTensor]
    ) -> Iterator[_PlannedTensor]:
        """Plan experts and routers in the place of dense MLPs."""
        of, router = self._mixture_class(recipe, mixture), self._router(recipe, mixture)
        for tensor in dense:
            layer, step = tensor.step.layer, tensor.step
            start, _, rest = step.name.partition("mlp.")
            projection = rest.removesuffix(".weight")
            found = None
            if layer is not None and projection in PROJECTIONS and start.endswith("."):
                found = matrices(of, mixture, layer, start, projection)
            if found is None:
                yield tensor
                continue
            assert layer is not None
            for matrix in found:
                yield self._planned_matrix(tensor, matrix, mixture, projection)
            if projection == PROJECTIONS[-1]:
                count, hidden = len(mixture.experts), router.directions.shape[2]
                routers = [(of.router(start), (count, hidden), router.rows)]
                if of.has_shared_expert:
                    routers.append((of.shared_gate(start), (1, hidden), router.shared_row))
                for name, shape, rows in routers:
                    key = repr((router.digest, shape, layer, mixture.router_slice(layer)))
                    given = _Given(key, partial(rows, mixture, layer), shape)
                    yield replace(_of_model(tensor, mixture.experts[0]), step=replace(step, name=name), given=given)

    def _planned_matrix(
        self, tensor: _PlannedTensor, matrix: Matrix, mixture: Mixture, projection: str
    ) -> _PlannedTensor:
        """Plan a matrix of an expert, which is a model's own or that of the recipe's merge."""
        step, is_down = replace(tensor.step, name=matrix.name), projection == PROJECTIONS[-1]
        model, scale = mixture.shared_expert if matrix.is_shared else None, mixture.shared_scale
        if matrix.expert is not None:
            model = mixture.experts[matrix.expert]
            scale = mixture.scales[matrix.expert] if mixture.scales else 1.0
        if model is not None:
            return replace(_of_model(tensor, model, scale if is_down else 1.0), step=step)
        if matrix.is_shared:
            outer, inner = self.sources[tensor.models[0][0]].shapes[step.inputs[0]]
            shape = (outer, SHARED) if is_down else (SHARED, inner)
            return replace(tensor, step=step, given=_Given(f"zeros {shape}", partial(torch.zeros, shape), shape))
        return replace(tensor, step=step, masked_as=tensor.mask_name)

    def _mixture_class(self, recipe: Recipe, mixture: Mixture) -> MixtureClass:
        depth = self.sources.depth(recipe.donor)
        if recipe.is_path(depth):
            raise RecipeError(
                "mixture: the recipe runs other layers than the models; leave out its path, or the mixture"
            )
        if outside := next((of for of in mixture.layer_ranges if of[1] > depth), None):
            raise RecipeError(
                f"mixture: layers {[*outside]} are outside the {plural(depth, 'layer')} of {recipe.donor}"
            )
        try:
            return class_of(self.sources.config(recipe.donor), mixture)
        except SourceError as error:
            raise RecipeError(f"mixture: {recipe.donor}: {error}") from error

    def _router(self, recipe: Recipe, mixture: Mixture) -> Router:
        config = text_config(self.sources.config(recipe.donor))
        wanted = (self.sources.depth(recipe.donor), len(mixture.experts), int(config["hidden_size"]))
        if mixture.router is None:
            return Router.of_copies(*wanted)
        router = read(self.sources.root / mixture.router)
        if tuple(router.directions.shape) != wanted:
            raise RecipeError(
                f"mixture: the router of {mixture.router} has {[*router.directions.shape]} layers, experts and numbers"
                f" a row, the recipe's mixture {[*wanted]}; it belongs to another recipe"
            )
        return router

    def _plan_dense(self, recipe: Recipe, quantize: str = "") -> Iterator[_PlannedTensor]:
        wanted = recipe.out_dtype or recipe.dtype
        dtype: torch.dtype | None = getattr(torch, wanted) if wanted else None
        shapes, experts = self.sources[recipe.donor].shapes, self._count_experts(recipe.donor)
        served = quantizer(quantize, shapes, self.sources.config(recipe.donor)) if quantize else None
        branches = branches_of(recipe, self.sources)
        prepared = self.prepared(recipe)
        for step in plan(recipe, [*shapes], self.sources.depth(recipe.donor)):
            each, shared = recipe.values(step.of, step.name, step.depth, step.inputs)
            base = recipe.origin_of(step.of)
            named = [(source.model, name) for source, name in zip(step.of.sources, step.inputs, strict=True)]
            places = [place for place, (model, _) in enumerate(named) if base is None or model != base]
            share = recipe.prepared_share(step.of, step.name, step.depth)
            yield _PlannedTensor(
                step=step,
                method=recipe.method_of(step.of),
                base=(base, step.base) if base else None,
                models=[named[place] for place in places],
                each={name: [values[place] for place in places] for name, values in each.items()},
                shared=shared,
                dtype=dtype or widest(self.sources[of].dtype(name) for of, name in named),
                rounding=served if served and served.stored(step.name, shapes[step.inputs[0]]) else None,
                fold=branches.fold(step.inputs[0], step.of.gains)
                if branches and step.of.gains and step.layer is not None
                else None,
                experts=is_stack_of_experts(step.inputs[0], shapes[step.inputs[0]], experts),
                prepared=prepared if share > 0.0 else None,
                share=share,
            )

    def prepared(self, recipe: Recipe) -> Prepared | None:
        """Return the prepared models of a recipe; None without a `prepare`. Makes nothing yet."""
        if recipe.prepare is None:
            return None
        key = repr((recipe.prepare, recipe.base_model, sorted(map(str, recipe.merged_references))))
        if key not in self._prepared:
            self._prepared[key] = Prepared(recipe, self.sources)
        return self._prepared[key]

    def _count_experts(self, donor: ModelReference) -> int:
        if donor not in self._experts:
            self._experts[donor] = experts_of(self.sources.config(donor))
        return self._experts[donor]

    def _weights(self, tensor: _PlannedTensor) -> tuple[Sequence[Weight], Mapping[str, Sequence[float]]]:
        """Return the weights to merge, and the values of the method's parameters for each.

        A linear method gets what is between an expert and the prepared one as two weights: both are read once.
        """
        prepared, each = tensor.prepared, tensor.each
        if prepared is None:
            return [self.sources[of].weight(name) for of, name in tensor.models], each
        if not tensor.method.is_linear:
            return [prepared.weight(*of, tensor.share) for of in tensor.models], each
        terms = [prepared.terms(*of, tensor.share) for of in tensor.models]
        scales = [weight * part for weight, parts in zip(each["weight"], terms, strict=True) for _, part in parts]
        return [weight for parts in terms for weight, _ in parts], {"weight": scales}

    def count(self, recipe: Recipe) -> TensorCounts:
        """Count the tensors of the models and the result; reads no floating-point weights but maps them.

        Raises SourceError for integers that a model has otherwise than the base, as they would be lost, unless the
        recipe gives it the weight 0 for them.
        """
        planned = [*self._plan(unprepared(recipe))]
        copied: dict[str, list[str]] = {}
        for tensor in planned:
            if reason := self._reason_to_copy(tensor, recipe.references):
                copied.setdefault(reason, []).append(tensor.step.name)
        left_out: dict[str, list[str]] = {}
        used = {name for tensor in planned for name in tensor.step.inputs}
        for name in self.sources[recipe.donor].shapes:
            if name not in used:
                left_out.setdefault("the recipe's slices leave their layers out", []).append(name)
        seen: set[str] = set()
        for reference in recipe.references:
            for name, reason in self.sources.left_out(reference).items():
                if name not in seen:  # several models may have it
                    left_out.setdefault(reason, []).append(name)
                seen.add(name)
        return TensorCounts(len(planned) - _number(copied), copied, left_out)

    def _reason_to_copy(self, tensor: _PlannedTensor, models: Sequence[ModelReference]) -> str:
        """Return why a tensor is copied; empty if it is merged."""
        if self._holds_integers(tensor, models[0]):
            return "integers"
        if tensor.fold:
            return ""
        if self._unchanged(tensor, self._weights(tensor)[0]) is not None:
            lent = self._lent(tensor)
            return f"only in {models[0]}: {' and '.join(sorted(lent))}" if lent else "no model changes them"
        is_base = tensor.method.keeps_base and not any(tensor.each["weight"])
        return "the weight of every model is 0" if is_base else ""

    def check(self, recipe: Recipe) -> None:
        """Raise SourceError for integers that would be lost, as `count` does; reads nothing else."""
        for tensor in self._plan(unprepared(recipe)):
            self._holds_integers(tensor, recipe.donor)

    def _holds_integers(self, tensor: _PlannedTensor, donor: ModelReference) -> bool:
        """Return whether a tensor holds integers, the same in all models that have a weight for it."""
        of, name = tensor.base or tensor.models[0]
        if self.sources[of].dtype(name).is_floating_point:
            return False
        first = self._first(tensor)
        weights = tensor.each.get("weight", [1.0] * len(tensor.models))
        for (model, own), weight in zip(tensor.models, weights, strict=True):
            if weight != 0.0 and not torch.equal(stored(self.sources[model].weight(own)), first):
                raise SourceError(
                    f"{model}: {own} holds integers, which cannot be merged, and other ones than in {donor}; give the"
                    " model the weight 0 for it by a filter of the recipe, or leave the model out"
                )
        return True

    def _base(self, tensor: _PlannedTensor) -> Tensor | None:
        return self.sources[tensor.base[0]].tensor(tensor.base[1]) if tensor.base else None

    def _first(self, tensor: _PlannedTensor) -> Tensor:
        """Return the base's tensor, or the first model's."""
        base, (of, name) = self._base(tensor), tensor.models[0]
        return base if base is not None else stored(self.sources[of].weight(name))

    def _unchanged(self, tensor: _PlannedTensor, models: Sequence[Weight]) -> Tensor | None:
        """Return the tensor to copy, if it holds no floating-point numbers, or no model changes the base's, or has it.

        Without an origin, weights need not add up to 1, but what only the base has is not scaled.
        """
        first = self._first(tensor)
        same_memory = all(isinstance(model, Tensor) and same(model, first) for model in models)
        unchanged = same_memory and (tensor.base is not None or self._lent(tensor))
        return first if unchanged or not first.is_floating_point() else None

    def _lent(self, tensor: _PlannedTensor) -> set[str]:
        """Return the part of the base that some models have a tensor from; empty if all have one of their own."""
        return {part for model, name in tensor.models if (part := self.sources.lent(model).get(name))}

    def rounding_loss(self, recipe: Recipe, tensors: int = 12) -> float:
        """Return the share of a merge's change that rounding to the result's type loses: ‖rounded - x‖ / ‖x - base‖.

        Above a half, most of the genes' effect is noise. Reads some `tensors` of the layers, evenly spread; 0 when the
        merge changes nothing. A model without a base is compared with its donor.
        """
        donor = self.sources[recipe.donor]
        planned = [of for of in self._plan(unprepared(recipe)) if of.step.layer is not None and not of.given]
        lost = changed = 0.0
        for tensor in planned[:: max(1, len(planned) // tensors)]:
            origin = donor.tensor(tensor.step.base)
            if not origin.is_floating_point():
                continue
            exact = self._merged(replace(tensor, dtype=torch.float32))
            lost += float((exact.to(tensor.dtype).float() - exact).square().sum())
            changed += float((exact - origin.float()).square().sum())
        return math.sqrt(lost / changed) if changed else 0.0

    def _merged(self, tensor: _PlannedTensor) -> Tensor:
        """Return one tensor, rounded to its type and format. Raises CandidateError when it is not finite."""
        method, name = tensor.method.name, tensor.step.name
        try:
            merged = self._combined(replace(tensor, dtype=torch.float32) if tensor.fold else tensor)
            merged = tensor.fold.apply(merged) if tensor.fold else merged
        except CandidateError as error:
            raise CandidateError(f"{method}: {name}: {error}") from error
        except FloatingPointError:
            merged = None
        if merged is not None and not merged.is_floating_point():
            return merged
        if merged is not None and merged.dtype != tensor.dtype:
            merged = merged.to(tensor.dtype)
        if merged is None or not is_finite(merged):
            raise CandidateError(f"{method}: the merged {name} is not finite (NaN or infinite)")
        return tensor.rounding.rounded(name, merged) if tensor.rounding else merged

    def _combined(self, tensor: _PlannedTensor) -> Tensor:
        """Return one tensor as its method makes it, or as it is stored when the models do not differ in it."""
        if tensor.given:
            return tensor.given.make()
        if tensor.copied:
            model, name = tensor.copied
            if not tensor.prepared:
                return self.sources[model].tensor(name)
            weight = tensor.prepared.weight(model, name, tensor.share)
            return weight.dense() if isinstance(weight, LowRank) else weight
        used = tensor.each.get("weight", [1.0] * len(tensor.models))
        read = [of for of, weight in zip(tensor.models, used, strict=True) if weight != 0.0]
        for model, name in [*read, *([tensor.base] if tensor.base else [])]:
            self._check_finite(model, name)
        models, each = self._weights(tensor)
        if (unchanged := self._unchanged(tensor, models)) is not None:
            return unchanged
        seeds = [seed_of(self.seed, tensor.mask_name, model) for model, _ in tensor.models]
        # What is between an expert and the prepared one is of this candidate alone: nothing of it is kept.
        keys = [] if 0.0 < tensor.share < 1.0 else [(tensor.base, *of, *tensor.preparation) for of in tensor.models]
        group = TensorGroup(self._base(tensor), models, each, tensor.shared, seeds, tensor.dtype, keys, self.cache)
        if tensor.experts and not tensor.method.by_entry:
            return _expert_by_expert(tensor.method, group, stored(models[0]).shape)
        return tensor.method.merge(group)

    def _check_finite(self, model: ModelReference, name: str) -> None:
        """Raise CandidateError for a source's weight that is not finite; trimming might drop such entries unseen."""
        if not self.cache.get(("finite", model, name), lambda: is_finite_weight(self.sources[model].weight(name))):
            raise CandidateError(
                f"in {model} it is not finite (NaN or infinite); download the model again, or leave it out"
            )


def _expert_by_expert(method: Method, group: TensorGroup, shape: Sequence[int]) -> Tensor:
    """Merge a tensor of several experts as if each expert's matrix were a tensor of its own."""
    merged = torch.empty(shape, dtype=group.dtype)
    for place, target in enumerate(merged):
        one = replace(
            group,
            base=None if group.base is None else group.base[place],
            models=[_expert(model, place) for model in group.models],
            seeds=[_digest(f"{seed}/{place}") for seed in group.seeds],
            keys=[(key, place) for key in group.keys],
        )
        target.copy_(method.merge(one))
    return merged


def _expert(weight: Weight, place: int) -> Weight:
    if isinstance(weight, LowRank):
        return LowRank(weight.origin[place], weight.up[place], weight.down[place])
    return weight[place]


def unprepared(recipe: Recipe) -> Recipe:
    """Return the recipe without its preparation and its router's file, for what does not depend on them."""
    mixture = recipe.mixture and recipe.mixture.model_copy(update={"router": None, "router_slices": None})
    return recipe.model_copy(update={"prepare": None, "mixture": mixture})


def branches_of(recipe: Recipe, sources: Sources) -> Branches | None:
    """Return where the gains of a recipe's slices are folded; None without gains.

    Raises RecipeError for a gain that cannot be folded exactly, with the reason.
    """
    if not any(of.gains for of in recipe.slices or []):
        return None
    try:
        branches = Branches(sources[recipe.donor].shapes, sources.config(recipe.donor))
        for of in recipe.slices or []:
            if of.gains:
                branches.check(of.gains, range(*of.sources[0].layer_range))
    except SourceError as error:
        raise RecipeError(f"{recipe.donor}: {error}") from error
    return branches


def merge(recipe: Recipe, sources: Sources, seed: Seed = 0) -> Iterator[tuple[str, Tensor]]:
    """Merge one recipe; see `Merger.merge`."""
    return Merger(sources, seed).merge(recipe)


def not_finite(sources: Sources, models: Iterable[ModelReference]) -> str:
    """Return which models have weights that are NaN or infinite, and where, or an empty text. Reads all weights."""
    found: list[str] = []
    for model in models:
        source = sources[model]
        wrong = [name for name in source.shapes if not is_finite_weight(source.weight(name))]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        if wrong:
            found.append(f"{model} has weights that are not finite (NaN or infinite): {', '.join(wrong[:3])}{more}")
    return f"{'; '.join(found)}. Candidates fail with it: download the model again, or leave it out" if found else ""


def seed_of(seed: Seed, tensor: str, model: ModelReference) -> int:
    """Return the seed of one model's random mask of one tensor: from the run's seed and the names, nothing else."""
    if not isinstance(seed, int):
        return seed(tensor, model)
    return _digest(f"{seed}/{tensor}/{model}")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def masks_of(recipe: Recipe, sources: Sources, seed: Seed) -> str | None:
    """Return the seed of every random mask as JSON, by tensor, models in the recipe's order; None without masks."""
    if not any(recipe.method_of(of).random for of in recipe.output_slices(1)):
        return None
    steps = plan(recipe, [*sources[recipe.donor].shapes], sources.depth(recipe.donor))
    models = recipe.references
    return json.dumps({step.name: [seed_of(seed, step.name, model) for model in models] for step in steps}) + "\n"


def read_masks(file: Path, recipe: Recipe) -> Seed:
    """Read the seeds of such a file, for a recipe whose models may have other names now. Raises UserError."""
    try:
        table: Mapping[str, Sequence[int]] = json.loads(file.read_text())
        places = {model: place for place, model in enumerate(recipe.references)}
        if any(len(seeds) != len(places) for seeds in table.values()):
            raise UserError(
                f"{file} belongs to a recipe with another number of models; leave out the line `# llmevo:` above"
            )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); it belongs to the recipe, download it again") from error

    def seed(tensor: str, model: ModelReference) -> int:
        if tensor not in table:
            raise UserError(f"{file}: has no seed for {tensor}; the models differ from those of the recipe")
        return table[tensor][places[model]]

    return seed
