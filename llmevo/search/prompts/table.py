"""A recipe as a table of integers: a row for every slice, a column for every parameter of a model.

Integers, because models continue and compare them far better than decimals (EvoLLM, https://arxiv.org/abs/2402.18381,
section 3): hundredths, and what stays small finer. Merge methods, where there are several, stand beside the table.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from llmevo.search.space import Gene, Genes, SearchSpace

SCALE = 100
"""Weights and densities are hundredths; so is what reaches up to a half or further."""


MOST = 64
"""Numbers of a table at most. Of larger spaces a prompt asks for some slices; the others keep the best values."""


@dataclass(frozen=True)
class GeneTable:
    """The table of some consecutive slices."""

    space: SearchSpace
    slices: tuple[str, ...]

    @classmethod
    def of(cls, space: SearchSpace, seed: int) -> "GeneTable":
        """All slices, or, of more than `MOST` numbers, as many as fit, from a place that the seed decides."""
        width = sum(not gene.choices for gene in space.genes) // len(space.slices)
        fitting = max(1, MOST // max(1, width))
        start = seed % max(1, len(space.slices) - fitting + 1)
        return cls(space, tuple(space.slices[start : start + fitting]))

    @property
    def whole(self) -> bool:
        return len(self.slices) == len(self.space.slices)

    @cached_property
    def numbers(self) -> list[Gene]:
        """The genes of the table, row by row."""
        return [gene for gene in self.space.genes if not gene.choices and gene.slice in self.slices]

    @cached_property
    def columns(self) -> list[Gene]:
        """The genes of the first row; all rows have the same."""
        return [gene for gene in self.numbers if gene.slice == self.slices[0]]

    @cached_property
    def choices(self) -> list[Gene]:
        """The genes that choose a method: none, one for the recipe, or one for every row."""
        return [gene for gene in self.space.genes if gene.choices and gene.slice in (None, *self.slices)]

    def rows(self, genes: Genes) -> list[list[int]]:
        """The integers of every row."""
        width = len(self.columns)
        values = [round(genes[gene.name] * scale(gene)) for gene in self.numbers]
        return [values[place * width : (place + 1) * width] for place in range(len(self.slices))]

    def methods(self, genes: Genes) -> list[str]:
        """The chosen methods."""
        return [gene.shown(genes[gene.name]) for gene in self.choices]


def scale(gene: Gene) -> int:
    """What a gene is multiplied by to be shown: 100, or more where it stays under a half."""
    if gene.parameter in ("weight", "density"):
        return SCALE
    return SCALE * 10 ** max(0, math.ceil(-math.log10(2 * max(abs(gene.low), abs(gene.high))) - 1e-9))
