"""What each adapter counts in each weight of a merge: the merge itself says so, asked to merge vectors of one 1 each.

The base stands as e₀ and its adapter i as e₀ + eᵢ. A merge that is linear in the models makes c₀·e₀ + Σ cᵢ·eᵢ of them,
and the merged weight is then c₀·W + Σ cᵢ·Bᵢ·Aᵢ, whatever normalizing, filters and gradients went into the cᵢ.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmevo.errors import CandidateError
from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.models.checkpoints import Source, Sources
from llmevo.models.references import ModelReference
from llmevo.models.weights import Weight

WHOLE = 1e-4
"""How far from 1 the base may count: more than rounding makes, less than can be seen in a model."""


class Vector:
    """A source with one short vector in place of every weight."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], vector: Tensor) -> None:
        self.shapes, self.vector = shapes, vector
        self.derived: Sequence[str] = ()

    def tensor(self, name: str) -> Tensor:
        return self.vector

    def weight(self, name: str) -> Weight:
        return self.vector


class Vectors(Sources):
    """Sources of vectors, with the configs of the real ones."""

    def __init__(self, sources: Sources, references: Sequence[ModelReference]) -> None:
        super().__init__(sources.root)
        adapted = [reference for reference in references if reference.lora]
        for reference in references:
            vector = torch.zeros(1 + len(adapted))
            vector[0] = 1.0
            if reference.lora:
                vector[1 + adapted.index(reference)] = 1.0
            self._sources[reference] = Vector(sources[reference].shapes, vector)

    def __getitem__(self, reference: ModelReference) -> Source:
        return self._sources[reference]


class Shares:
    """What each of a base's adapters counts in a merge of them."""

    def __init__(self, sources: Sources, references: Sequence[ModelReference]) -> None:
        """`references` are the base and its adapters, whose order is the shares'."""
        self._merger = Merger(Vectors(sources, references))

    def of(self, recipe: Recipe) -> dict[str, Tensor]:
        """{weight: the share of each adapter}. Raises CandidateError where the base does not count 1 in all of them,
        as when `linear` does not divide by a sum of weights that cancel out.
        """
        exact = recipe.model_copy(update={"dtype": "float32", "out_dtype": None})
        found: dict[str, Tensor] = {}
        for name, vector in self._merger.merge(exact):
            if abs(float(vector[0]) - 1.0) > WHOLE:
                raise CandidateError(f"{name}: the base counts {float(vector[0]):g} in it, not 1")
            found[name] = vector[1:]
        return found
