"""A recipe as a table of integers: a row for every slice, a column for every parameter of a model.

LLMs continue and compare integers far better than decimals (EvoLLM, https://arxiv.org/abs/2402.18381, section 3). They
are hundredths, or smaller units for parameters of a small range.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from llmevo.search.space import Gene, Genes, SearchSpace

MOST = 64  # numbers of a table; in larger spaces a prompt asks for some slices, and the others keep the best values


@dataclass(frozen=True)
class GeneTable:
    """The table of some consecutive slices."""

    space: SearchSpace
    slices: tuple[str, ...]

    @classmethod
    def of(cls, space: SearchSpace, seed: int) -> "GeneTable":
        """Return the table of all slices, or of as many as `MOST` numbers fill, from a start that the seed decides."""
        width = sum(not gene.choices and gene.slice is not None for gene in space.genes) // len(space.slices)
        fitting = max(1, MOST // max(1, width))
        start = seed % max(1, len(space.slices) - fitting + 1)
        return cls(space, tuple(space.slices[start : start + fitting]))

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
        """Return the integers of every row."""
        width = len(self.columns)
        values = [round(genes[gene.name] * scale(gene)) for gene in self.numbers]
        return [values[place * width : (place + 1) * width] for place in range(len(self.slices))]

    def methods(self, genes: Genes) -> list[str]:
        """Return the chosen methods."""
        return [gene.shown(genes[gene.name]) for gene in self.choices]


def scale(gene: Gene) -> int:
    """Return the factor from a gene to its integer: 100, or more where its values stay below a half."""
    if gene.parameter in ("weight", "density"):
        return 100
    return 100 * 10 ** max(0, math.ceil(-math.log10(2 * max(abs(gene.low), abs(gene.high))) - 1e-9))
