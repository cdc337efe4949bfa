"""How points of the search space look to a model of their scores."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmevo.genes import Genes
from llmevo.space import SearchSpace

Array = NDArray[np.float64]

UNUSED = 0.5
"""What a gene is set to that the chosen method does not have: so it makes no difference."""


class Features:
    """Numbers first, in the order of the genes; then a 0 or 1 for each choice that a gene has."""

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self.numbers = [place for place, gene in enumerate(space.genes) if not gene.choices]
        self.choices = [place for place, gene in enumerate(space.genes) if gene.choices]
        self.size = len(self.numbers) + sum(len(space.genes[place].choices) for place in self.choices)
        self._used: dict[tuple[float, ...], NDArray[np.bool_]] = {}

    def used(self, genes: Genes) -> NDArray[np.bool_]:
        """Which of all genes count; remembered for every combination of choices."""
        if not self.choices:
            return np.ones(len(self._space.genes), dtype=bool)
        chosen = tuple(genes[self._space.genes[place].name] for place in self.choices)
        if chosen not in self._used:
            self._used[chosen] = self._space.active(genes)
        return self._used[chosen]

    def essence(self, genes: Genes) -> tuple[float, ...]:
        """What two candidates have in common that make the same model."""
        values = np.array([genes[gene.name] for gene in self._space.genes])
        return tuple(np.where(self.used(genes), values, UNUSED).tolist())

    def of(self, points: Sequence[Array] | Array) -> Array:
        """One row of features for every point of the unit cube."""
        cube = np.asarray(points, dtype=np.float64).reshape(-1, len(self._space.genes))
        if not self.choices:
            return cube
        rows = np.zeros((len(cube), self.size))
        for row, point in zip(rows, cube, strict=True):
            genes = self._space.from_unit(point)
            row[: len(self.numbers)] = np.where(self.used(genes), point, UNUSED)[self.numbers]
            start = len(self.numbers)
            for place in self.choices:
                gene = self._space.genes[place]
                row[start + int(genes[gene.name])] = 1.0
                start += len(gene.choices)
        return rows
