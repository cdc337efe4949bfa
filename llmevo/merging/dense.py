"""Recipes that make one dense model of a mixture of experts, by the measured use of its routers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmevo.merging.methods.registry import WIDEN
from llmevo.merging.recipe import BY_SLICE, Recipe
from llmevo.models.references import ModelReference

DIGITS = 6
"""Decimals of the weights of a recipe."""

Table = Sequence[Sequence[float]]
"""A number for each expert of each layer."""


@dataclass(frozen=True)
class RouterUse:
    """How much a mixture uses each expert of each layer on some texts."""

    median: Table
    """The routers' probabilities at a low temperature, 0 for experts that a token is not sent to: the median over the
    tokens of a text, the mean over texts. Most are 0; it is for weights of an average."""
    mean: Table
    """The weights that the mixture gives its experts, the mean over tokens. Those of a layer add up to 1, or less where
    the model does not divide by the sum of the chosen experts' probabilities."""
    texts: int
    tokens: int
    seconds: float
    """What measuring took; 0 for a table that was measured before."""

    def weights(self, layer: int) -> list[float]:
        """Return the weights of the experts in an average, with the sum 1: the median, or the mean where that is 0."""
        row = self.median[layer] if sum(self.median[layer]) > 0.0 else self.mean[layer]
        return [value / sum(row) for value in row]

    def mass(self, layer: int) -> float:
        """Return the sum of the weights that the mixture gives the experts of a layer."""
        return sum(self.mean[layer])

    def most_used(self, layer: int, count: int) -> list[int]:
        """Return the experts with the largest mean weights, the largest first."""
        row = self.mean[layer]
        return sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:count]


def expert_of(mixture: ModelReference, expert: int) -> ModelReference:
    """Return the reference of one expert."""
    return ModelReference(model=mixture.model.model_copy(update={"expert": expert}))


def average(mixture: ModelReference, use: RouterUse) -> Recipe:
    """Return the average of the experts, in every layer by its use, scaled to what the mixture adds."""
    slices: list[dict[str, Any]] = []
    for layer in range(len(use.mean)):
        weights = {place: weight for place, weight in enumerate(use.weights(layer)) if round(weight, DIGITS) > 0.0}
        slices.append(_slice(mixture, layer, weights))
    gains = [round(use.mass(layer), DIGITS) for layer in range(len(slices))]
    if all(abs(gain - 1.0) < 1e-4 for gain in gains):
        return Recipe.model_validate({"merge_method": "linear", "slices": slices})
    own = [{**of, "merge_method": "linear", "gains": {"mlp": gain}} for of, gain in zip(slices, gains, strict=True)]
    return Recipe.model_validate({"merge_method": BY_SLICE, "slices": own})


def widened(mixture: ModelReference, use: RouterUse, count: int) -> Recipe:
    """Return the model with the neurons of the `count` most used experts of every layer: see `merging.widening`."""
    slices: list[dict[str, Any]] = []
    for layer in range(len(use.mean)):
        chosen = {place: use.mean[layer][place] for place in use.most_used(layer, count)}
        of = _slice(mixture, layer, chosen if sum(chosen.values()) else dict.fromkeys(chosen, 1.0))
        mass = round(use.mass(layer), DIGITS)
        slices.append({**of, **({"parameters": {"scale": mass}} if abs(mass - 1.0) >= 1e-4 else {})})
    return Recipe.model_validate({"merge_method": WIDEN, "slices": slices})


def uniform(mixture: ModelReference, experts: int) -> Recipe:
    """Return the plain average of all experts."""
    models = [
        {"model": str(expert_of(mixture, place)), "parameters": {"weight": round(1 / experts, DIGITS)}}
        for place in range(experts)
    ]
    return Recipe.model_validate({"merge_method": "linear", "models": models})


def _slice(mixture: ModelReference, layer: int, weights: Mapping[int, float]) -> dict[str, Any]:
    return {
        "sources": [
            {
                "model": str(expert_of(mixture, expert)),
                "layer_range": [layer, layer + 1],
                "parameters": {"weight": round(weight, DIGITS)},
            }
            for expert, weight in weights.items()
        ]
    }
