"""The search space: points of the unit cube, the genes they stand for, and the recipe that these mean."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from llmevo.decoding import ALONE, decode
from llmevo.genes import Gene, Genes, Layout
from llmevo.genome import declared_by, walks
from llmevo.methods import Method
from llmevo.recipe import Recipe
from llmevo.references import ModelReference

COEFFICIENTS = 3
"""Common weights that are tried beside the uniform merge's, at most."""


class SearchSpace(Layout):
    """The genes of a genome over a model of some depth, and what their values mean.

    Points are `Genes` (by name) outside, and arrays in the unit cube for the optimizers, in the order of `genes`.
    """

    def clamp(self, genes: Mapping[str, float]) -> Genes:
        """The values moved into their bounds and onto their grid; the form in which genes are kept."""
        return {g.name: g.clamp(genes[g.name]) for g in self.genes}

    def contains(self, genes: Mapping[str, float]) -> bool:
        return all(g.name in genes and g.low <= genes[g.name] <= g.high for g in self.genes)

    def to_unit(self, genes: Mapping[str, float]) -> NDArray[np.float64]:
        """The point in the unit cube, clipped to it."""
        return np.array([g.to_unit(genes[g.name]) for g in self.genes])

    def from_unit(self, point: NDArray[np.float64]) -> Genes:
        """The values of a point, clipped into the bounds."""
        return {g.name: g.from_unit(float(x)) for g, x in zip(self.genes, point, strict=True)}

    def active(self, genes: Mapping[str, float]) -> NDArray[np.bool_]:
        """Which genes the recipe of these values depends on: those of the chosen methods."""
        used = {
            self.name(column, label, filter_)
            for label, method in zip(self.slices, self.methods(genes), strict=True)
            for column in self.columns_of(method)
            for filter_ in self.filters
        }
        return np.array([bool(gene.choices) or gene.name in used for gene in self.genes])

    def uniform(self) -> Genes:
        """All models alike: weight 1/n, t half-way, nothing trimmed; the first of several methods.

        mergekit-evolve's starting point.
        """
        return {g.name: 0.0 if g.choices else self._start(g) for g in self.genes}

    def coefficients(self) -> dict[float, Genes]:
        """Merges with one weight for all models, other than the uniform merge's, by that weight; none where the
        methods give weights no scale.

        In task arithmetic this is the scaling coefficient (Ilharco et al., https://arxiv.org/abs/2212.04089), which
        decides most of a merge's score: the uniform merge, the mean of the task vectors, is mostly too small, and
        their sum (weight 1) too large. Between these two lie up to three weights, in equal ratios, so that no weight
        between is far from one of them. The middle one is 1/√n: there the merged task vector is as long as one of
        theirs, where they are orthogonal and of equal length. For four models the weights are 0.35, 0.5 and 0.71. A
        ratio below √2 would tell little, so two models have one weight (0.71) and three have two. A gene's bounds
        below 1 take the place of 1.

        Only for methods that add weighted task vectors to the base (`Genome.scales`) without `normalize`; of several
        methods, for the first of those. All other genes are as in the uniform merge.
        """
        methods = self.genome.methods
        place = next((place for place, method in enumerate(methods) if self.genome.scales(method)), None)
        weights = [gene for gene in self.genes if gene.parameter == "weight"]
        if place is None or not weights:
            return {}
        low, high = max(1 / len(self.genome.merged(methods[place])), weights[0].low), min(1.0, weights[0].high)
        steps = min(COEFFICIENTS + 1, round(2 * math.log2(high / low))) if high > low > 0 else 1
        found = [round(low * (high / low) ** (step / steps), 2) for step in range(1, steps)]
        uniform = self.uniform()
        return {
            value: self.clamp(
                {g.name: value if g in weights else float(place) if g.choices else uniform[g.name] for g in self.genes}
            )
            for value in found
            if low < value < high
        }

    def _start(self, gene: Gene) -> float:
        """Where the first method that has this gene starts."""
        for method in self.genome.methods:
            declared = declared_by(method).get(gene.parameter)
            if declared is None or not declared.is_gene:
                continue
            if declared.start is not None:
                return declared.start
            if gene.parameter in method.each:
                return round(1 / len(self.genome.merged(method)), 6)
            return ((declared.low or 0.0) + (declared.high or 1.0)) / 2
        raise KeyError(gene.name)

    def parent(self, model: ModelReference) -> Genes:
        """The genes at which the merge is that model alone.

        Where the methods have none, as methods without weights, it is no point of the space: `{"model/alone": 1.0}`.
        """
        for place, method in enumerate(self.genome.methods):
            if self._reaches(method, model):
                name = self.names[model]
                return {
                    g.name: float(place)
                    if g.choices
                    else float(g.model == name)
                    if g.parameter in ("weight", "scale", "t")
                    else self._start(g)
                    for g in self.genes
                }
        return {f"{self.names[model]}/{ALONE}": 1.0}

    def _reaches(self, method: Method, model: ModelReference) -> bool:
        """Whether a method gives a model alone, where that one has weight 1 and all others have 0."""
        weighted = walks(method) or "weight" in method.each or "scale" in method.each
        return weighted and model in self.genome.merged(method) and self.genome.parameters.get("lambda", 1.0) == 1.0

    def decode(self, genes: Mapping[str, float]) -> Recipe:
        """The recipe that these values mean."""
        return decode(self, genes)
