"""How points of the search space look to a model of their scores."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmevo.search.space import Genes, SearchSpace

Array = NDArray[np.float64]


UNUSED = 0.5
"""What a gene is set to that the chosen method does not have: so it makes no difference."""


CHOICE = 0.5
"""How far a choice is from another, in numbers' ranges, but for the root of two."""


class Features:
    """Numbers first, in the order of the genes; then a 0 or a half for each choice that a gene has."""

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
        chosen = np.column_stack([self._chosen(cube[:, place], place) for place in self.choices])
        combinations, of = np.unique(chosen, axis=0, return_inverse=True)
        first = [int(np.argmax(of == place)) for place in range(len(combinations))]
        used = np.array([self.used(self._space.from_unit(cube[place])) for place in first])
        numbers = np.where(used[of], cube, UNUSED)[:, self.numbers]
        kinds = [
            CHOICE * np.eye(len(self._space.genes[place].choices))[column]
            for place, column in zip(self.choices, chosen.T, strict=True)
        ]
        return np.hstack([numbers, *kinds])

    def chosen(self, point: Array) -> tuple[int, ...]:
        """Which choices a point of the unit cube has."""
        return tuple(int(self._chosen(point[place : place + 1], place)[0]) for place in self.choices)

    def _chosen(self, column: Array, place: int) -> NDArray[np.int64]:
        """Which choice each of a gene's places in the unit interval is, as `Gene.from_unit` has it."""
        count = len(self._space.genes[place].choices)
        return np.clip(np.floor(column * count), 0, count - 1).astype(np.int64)
