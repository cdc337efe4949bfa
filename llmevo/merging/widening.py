"""Static widening of MLPs: the models of a recipe with `merge_method: widen` as one wider model.

A sum of MLPs is one MLP with the neurons of all. So Σ pᵢ·Dᵢ(act(Gᵢx) ⊙ Uᵢx), a mixture of experts whose routers always
say p, is the dense model with G = [G₁; …; Gₖ], U = [U₁; …; Uₖ] and D = [p₁D₁ … pₖDₖ], and k times the neurons.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmevo.errors import RecipeError
from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.methods.registry import WIDEN
from llmevo.merging.plan import Step, plan
from llmevo.merging.recipe import Recipe
from llmevo.models.architecture import text_config
from llmevo.models.checkpoints import Source, TensorCache, widest
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources, View

MLP = re.compile(r"\.mlp\.(gate_proj|up_proj|down_proj)\.(weight|bias)$")
SIZE = "intermediate_size"


class Widened(View):
    """The models of a recipe, the donor of which is the recipe's wider result."""

    def __init__(self, whole: Sources, recipe: Recipe) -> None:
        """Raises RecipeError for a recipe that has no such result."""
        super().__init__(whole)
        donor, depth = recipe.donor, whole.depth(recipe.donor)
        slices = recipe.output_slices(depth)
        numbers = {len(of.sources) for of in slices}
        if len(numbers) > 1:
            raise RecipeError(
                f"slices: {WIDEN} puts the neurons of {min(numbers)} models into some layers and of {max(numbers)} into"
                " others, and config.json names one number of neurons; name as many models in every slice"
            )
        if recipe.is_path(depth):
            raise RecipeError(f"slices: {WIDEN} keeps the models' layers and their order; give each layer once")
        steps = plan(recipe, [*whole[donor].shapes], depth)
        if not any(MLP.search(step.name) for step in steps):
            raise RecipeError(
                f"{WIDEN}: {donor} has no MLPs of gate_proj, up_proj and down_proj; write experts of a mixture as"
                " MODEL#expert=0"
            )
        self._donor, self._factor = donor, numbers.pop()
        self._wide = _Wide(whole, recipe, steps, self._factor)

    def __getitem__(self, reference: ModelReference) -> Source:
        return self._wide if reference == self._donor else self.whole[reference]

    def config(self, reference: ModelReference) -> dict[str, Any]:
        config = self.whole.config(reference)
        if reference != self._donor:
            return config
        text = text_config(config)
        wide = {**text, SIZE: int(text[SIZE]) * self._factor}
        return wide if text is config else {key: wide if of is text else of for key, of in config.items()}


class _Wide(Source):
    def __init__(self, whole: Sources, recipe: Recipe, steps: Sequence[Step], factor: int) -> None:
        self._whole, self._recipe, self._kept = whole, recipe, TensorCache()
        self._steps: Mapping[str, Step] = {step.name: step for step in steps}
        donor = whole[recipe.donor]
        self.derived = donor.derived
        self.shapes = {name: _widened(name, donor.shapes[name], factor) for name in self._steps}
        for name in self._steps:
            self._shares(name)  # raises

    def _shares(self, name: str) -> tuple[list[float], list[float]]:
        """Return the weight of each model for a tensor, and its share of the sum of MLPs."""
        step = self._steps[name]
        down = MLP.sub(".mlp.down_proj.weight", name)
        inputs = [MLP.sub(".mlp.down_proj.weight", of) for of in step.inputs]
        each, shared = self._recipe.values(step.of, down, step.depth, inputs)
        weights = each["weight"]
        total = math.fsum(weights)
        if min(weights) < 0.0 or total <= 0.0:
            raise RecipeError(f"{WIDEN}: the weights for {name} are {weights}; give weights of 0 or more, not all 0")
        return weights, [shared["scale"] * weight / total for weight in weights]

    def tensor(self, name: str) -> Tensor:
        step = self._steps[name]
        named = zip(step.of.sources, step.inputs, strict=True)
        weights = [self._whole[source.model].weight(of) for source, of in named]
        tensors = [weight if isinstance(weight, Tensor) else weight.dense() for weight in weights]
        found = MLP.search(name)
        is_bias_of_sum = found is not None and found.groups() == ("down_proj", "bias")
        if found and not is_bias_of_sum:
            return self._kept.get(name, lambda: self._joined(name, found[1], tensors))
        if not tensors[0].is_floating_point():
            return tensors[0]
        shares = self._shares(name)[is_bias_of_sum]
        group = TensorGroup(None, weights, {"weight": shares}, {}, [0] * len(weights))
        merged = self._recipe.method_of(step.of).merge(group)
        return merged * math.fsum(shares) if is_bias_of_sum else merged

    def _joined(self, name: str, projection: str, tensors: Sequence[Tensor]) -> Tensor:
        if projection != "down_proj":
            return torch.cat([*tensors])
        shares = self._shares(name)[1]
        return torch.cat([tensor.float() * share for tensor, share in zip(tensors, shares, strict=True)], dim=1)

    def dtype(self, name: str) -> torch.dtype:
        step = self._steps[name]
        named = zip(step.of.sources, step.inputs, strict=True)
        return widest(self._whole[source.model].dtype(of) for source, of in named)


def _widened(name: str, shape: tuple[int, ...], factor: int) -> tuple[int, ...]:
    found = MLP.search(name)
    if found is None:
        return shape
    if found[1] != "down_proj":
        return shape[0] * factor, *shape[1:]
    return (shape[0], shape[1] * factor) if found[2] == "weight" else shape


def widened(recipe: Recipe, sources: Sources) -> tuple[Recipe, Sources]:
    """Return a recipe and its models; for `widen` the recipe of one model, the wider one, and a view that has it.

    Raises RecipeError for a recipe that has no such result.
    """
    if recipe.merge_method != WIDEN:
        return recipe, sources
    if recipe.mixture:
        raise RecipeError(f"mixture: its experts are models of one size, and {WIDEN} makes a wider one; leave one out")
    of_one = Recipe.of_one(recipe.donor, recipe.out_dtype or recipe.dtype)
    return of_one, Widened(sources, recipe)
