"""The merge: a recipe and the models' weights in, the merged weights out, one at a time.

One generator with two sinks, the engine and the exporter: what was scored is what is saved, bit for bit.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmevo.errors import CandidateError, RecipeError
from llmevo.methods.base import Delta, Inputs
from llmevo.recipe import OutputSlice, Recipe
from llmevo.references import ModelReference
from llmevo.sources import Source, Sources

LAYER = re.compile(r"^(.*?\.?(?:layers|h|blocks)\.)(\d+)(\..+)$")
"""A tensor of a layer: what stands before the layer's number, the number, and what stands after it."""

BEFORE_LAYERS = ("embed", "wte", "wpe")
"""Tensors that come before the layers: they take the first slice's parameters, all others the last one's."""


@dataclass(frozen=True)
class Step:
    """One tensor of the result: its name, and what it is called in each source of its slice."""

    name: str
    of: OutputSlice
    depth: float
    """Where in the slice it lies, 0 to 1, for gradients."""
    inputs: tuple[str, ...]
    base: str
    """What it is called in the base model."""


def depth_of(config: Mapping[str, Any]) -> int:
    """The number of layers, from a model's config. Raises RecipeError when it names none."""
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        if key in config:
            return int(config[key])
    raise RecipeError("the model's config.json names no number of layers (num_hidden_layers)")


def plan(recipe: Recipe, names: list[str], layers: int) -> list[Step]:
    """Every tensor of the result, in the order of a checkpoint: before the layers, the layers, after them.

    `names` are the donor's tensors. Raises RecipeError when a slice reaches past the `layers` there are.
    """
    slices = recipe.output_slices(layers)
    outside = [name for name in names if not LAYER.match(name)]
    steps = [_outside(name, slices[0]) for name in outside if any(part in name for part in BEFORE_LAYERS)]
    by_layer: dict[int, list[tuple[str, str]]] = {}
    for name in names:
        if match := LAYER.match(name):
            by_layer.setdefault(int(match[2]), []).append((match[1], match[3]))
    layer = 0
    for of in slices:
        for source in of.sources:
            if source.layer_range[0] < 0 or source.layer_range[1] > layers:
                raise RecipeError(
                    f"layer_range {[*source.layer_range]} of {source.model} is outside its {layers} layers"
                )
        for offset in range(of.depth):
            depth = offset / (of.depth - 1) if of.depth > 1 else 1.0
            starts = [source.layer_range[0] for source in of.sources]
            origin = of.base_model or recipe.base_model
            base = next((s.layer_range[0] for s in of.sources if s.model == origin), starts[0])
            for before, after in by_layer[starts[0] + offset]:
                inputs = tuple(f"{before}{start + offset}{after}" for start in starts)
                steps.append(Step(f"{before}{layer}{after}", of, depth, inputs, f"{before}{base + offset}{after}"))
            layer += 1
    steps += [_outside(name, slices[-1]) for name in outside if not any(part in name for part in BEFORE_LAYERS)]
    return steps


def _outside(name: str, of: OutputSlice) -> Step:
    return Step(name, of, 0.0, (name,) * len(of.sources), name)


def merge(recipe: Recipe, sources: Sources, seed: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, merged weight) for every tensor of the result.

    Arithmetic is float32, rounded once to `out_dtype`, or `dtype`, or the donor's own type. `seed` decides the
    random masks of the methods that have them. A tensor nobody changed comes as a mapped view of its source:
    do not write into it. Raises CandidateError when a merged weight is not finite.
    """
    donor = sources[recipe.donor]
    wanted = recipe.out_dtype or recipe.dtype
    dtype: torch.dtype | None = getattr(torch, wanted) if wanted else None
    for step in plan(recipe, [*donor.shapes], depth_of(sources.config(recipe.donor))):
        merged = _merge_one(recipe, sources, step, seed)
        if not merged.is_floating_point():
            yield step.name, merged
            continue
        rounded = merged.to(dtype or donor.tensor(step.inputs[0]).dtype)
        # A sum is finite only if all of its terms are, and costs one pass without a temporary.
        if not torch.isfinite(rounded.sum(dtype=torch.float32)):
            raise CandidateError(f"{recipe.merge_method}: the merged {step.name} is not finite (NaN or infinite)")
        yield step.name, rounded


def _merge_one(recipe: Recipe, sources: Sources, step: Step, seed: int) -> Tensor:
    """One tensor, in float32, or as it is stored when the models do not differ in it."""
    method = recipe.method
    each, shared = recipe.values(step.of, step.name, step.depth, step.inputs)
    base = step.of.base_model or recipe.base_model
    places = [i for i, source in enumerate(step.of.sources) if not (source.model == base and _is_origin(recipe))]
    models = [step.of.sources[i].model for i in places]
    each = {name: [values[i] for i in places] for name, values in each.items()}
    origin = sources[base] if base else None
    if (copied := _copied(recipe, each, shared)) is not None:
        return sources[models[copied]].tensor(step.inputs[places[copied]])

    if method.takes_base:
        assert origin is not None
        deltas = [
            _delta(sources[model], step.inputs[i], origin, step.base) for i, model in zip(places, models, strict=True)
        ]
        start = origin.tensor(step.base)
        if all(delta is None for delta in deltas) or not start.is_floating_point():
            return start
        zero = torch.zeros(()).expand(start.shape)
        tensors: list[Delta] = [zero if delta is None else delta for delta in deltas]
    else:
        weights = [sources[model].tensor(step.inputs[i]) for i, model in zip(places, models, strict=True)]
        start = origin.tensor(step.base) if origin else weights[0]
        if not start.is_floating_point():
            return weights[0]
        tensors = [weight.float() for weight in weights]
    seeds = [seed_of(seed, step.name, model) for model in models]
    return method.merge(Inputs(start.float() if origin else None, tensors, each, shared, seeds))


def _is_origin(recipe: Recipe) -> bool:
    """Whether the base is where the merge starts from, not one of the models it mixes."""
    return recipe.method.takes_base or recipe.method.pair


def _copied(recipe: Recipe, each: Mapping[str, list[float]], shared: Mapping[str, float]) -> int | None:
    """The place of the one model that the merge is a copy of, if it is: it has weight 1, all others have 0.

    Such a merge is that model bit for bit, which base + (model - base) is not in floating point.
    """
    if recipe.method.pair:
        return 0 if shared["t"] == 1.0 else None
    weights = each.get("weight", [])
    used = [place for place, weight in enumerate(weights) if weight != 0.0]
    if len(used) != 1 or each.keys() - {"weight", "density"}:
        return None
    whole = (weights[used[0]], each.get("density", weights)[used[0]], shared.get("lambda", 1.0))
    return used[0] if whole == (1.0, 1.0, 1.0) else None


def _delta(source: Source, name: str, origin: Source, base: str) -> Delta | None:
    """The task vector of one tensor, which another layer of the base may be the origin of."""
    return source.delta(name, origin) if name == base else source.tensor(name).float() - origin.tensor(base).float()


def seed_of(seed: int, tensor: str, model: ModelReference) -> int:
    """The seed of one model's random mask of one tensor: from the run's seed and the names, nothing else."""
    digest = hashlib.blake2b(f"{seed}/{tensor}/{model}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
