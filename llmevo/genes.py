"""The genes of a genome: what the search may set, under which name and between which bounds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from llmevo.errors import ConfigError
from llmevo.genome import OTHER, Genome, declared_by
from llmevo.methods import Method
from llmevo.plurals import plural
from llmevo.references import ModelReference

Genes = dict[str, float]
"""A value for every gene, by name; of a gene with choices the place of one of them."""

STEP = 1e-4
"""Genes are multiples of this: finer differences are lost in any 16-bit model, and recipes stay readable."""

METHOD = "merge_method"
"""What the gene is called that chooses among several methods."""

Column = tuple[ModelReference | None, str]
"""What a slice has a gene for: a model and its parameter, or no model and a parameter that all of them share."""


@dataclass(frozen=True)
class Gene:
    """One number of a recipe that the search may set, or one choice."""

    name: str
    """`model/slice/parameter` or `model/slice/filter/parameter`, without a model where all share it; `merge_method`
    where it holds for the whole recipe."""
    model: str | None
    slice: str | None
    """The layers, first and last: `0-9`; `all` when there is one slice; None for the whole recipe."""
    filter: str | None
    parameter: str
    low: float
    high: float
    choices: tuple[str, ...] = ()
    """The names to choose from; then the values are their places, 0, 1, 2 …"""

    @cached_property
    def _decimals(self) -> int:
        """A narrow range has a finer grid: a thousand steps at least."""
        return max(round(-math.log10(STEP)), math.ceil(-math.log10((self.high - self.low) / 1000) - 1e-9))

    def clamp(self, value: float) -> float:
        """The value moved into the bounds and onto the grid."""
        inside = min(max(value, self.low), self.high)
        if self.choices:
            return float(round(inside))
        step = 10.0**-self._decimals
        # Bounded again at the end: a bound need not lie on the grid.
        return min(max(round(round(inside / step) * step, self._decimals + 2), self.low), self.high)

    def to_unit(self, value: float) -> float:
        """The place in [0, 1]; choices have equal shares of it, and stand in the middle of theirs."""
        if self.choices:
            return (self.clamp(value) + 0.5) / len(self.choices)
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def from_unit(self, place: float) -> float:
        """The value at a place of [0, 1]."""
        if self.choices:
            return float(min(max(math.floor(place * len(self.choices)), 0), len(self.choices) - 1))
        return self.clamp(self.low + place * (self.high - self.low))

    def shown(self, value: float) -> str:
        """The value as people read it: the name of a choice, or the number."""
        return self.choices[int(self.clamp(value))] if self.choices else f"{value:g}"

    def described(self) -> dict[str, Any]:
        """The gene as the log has it."""
        described = {"name": self.name, "low": self.low, "high": self.high}
        return {**described, "choices": [*self.choices]} if self.choices else described


def short_names(references: Sequence[ModelReference]) -> dict[ModelReference, str]:
    """What people call each model: its last path part, with the parent folder's where two would be alike."""
    names = [reference.name for reference in references]
    unique: dict[ModelReference, str] = {}
    for reference, name in zip(references, names, strict=True):
        parent = Path((reference.lora or reference.model).path).parent.name
        longer = f"{parent}-{name}" if names.count(name) > 1 and parent else name
        unique[reference] = longer if longer not in unique.values() else f"{longer}-{len(unique)}"
    return unique


class Layout:
    """Which genes a genome has over a model of some depth, slice by slice."""

    def __init__(self, genome: Genome, layers: int) -> None:
        """Raises ConfigError when `layer_granularity` does not divide `layers`."""
        step = genome.layer_granularity or layers
        if layers % step:
            divisors = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
            raise ConfigError(
                f"genome.layer_granularity: {step} does not divide the {plural(layers, 'layer')} of the models;"
                f" use one of {divisors}"
            )
        self.genome, self.layers = genome, layers
        self.names = short_names(genome.references)
        starts = range(0, layers, step)
        self.spans = [(start, start + step) for start in starts]
        self.slices = ["all"] if len(self.spans) == 1 else [f"{start}-{stop - 1}" for start, stop in self.spans]
        self.filters: list[str | None] = [*genome.filters, None] if genome.filters else [None]

    @property
    def merged(self) -> list[ModelReference]:
        """The models that any of the methods mixes: a base that is the origin has no task vector of its own."""
        mixed = [model for method in self.genome.methods for model in self.genome.merged(method)]
        return [model for model in dict.fromkeys([*self.genome.models, *self.genome.references]) if model in mixed]

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        genes = [] if self.genome.method_per_slice else [*self._choice(None)]
        for label in self.slices:
            if self.genome.method_per_slice:
                genes += self._choice(label)
            for _, group in groupby(self._columns.items(), key=lambda item: item[0][0]):
                columns = [*group]
                for filter_ in self.filters:
                    genes += [self._gene(column, bounds, label, filter_) for column, bounds in columns]
        return tuple(genes)

    def _gene(self, column: Column, bounds: tuple[float, float], label: str, filter_: str | None) -> Gene:
        model, parameter = column
        whose = None if model is None else self.names[model]
        return Gene(self.name(column, label, filter_), whose, label, filter_, parameter, *bounds)

    def _choice(self, label: str | None) -> list[Gene]:
        """The gene that chooses the method, where there are several."""
        names = tuple(method.name for method in self.genome.methods)
        if len(names) < 2:
            return []
        return [Gene(f"{label}/{METHOD}" if label else METHOD, None, label, None, METHOD, 0.0, len(names) - 1.0, names)]

    @cached_property
    def _columns(self) -> dict[Column, tuple[float, float]]:
        """What a slice has genes for, model by model and the shared ones last, and between which bounds."""
        found: dict[Column, tuple[float, float]] = {}
        for method in self.genome.methods:
            for column in self.columns_of(method):
                low, high = self._bounds(method, column[1])
                widest = found.get(column, (low, high))
                found[column] = (min(low, widest[0]), max(high, widest[1]))
        order: list[ModelReference | None] = [*self.merged, None]
        return dict(sorted(found.items(), key=lambda item: order.index(item[0][0])))

    def columns_of(self, method: Method) -> list[Column]:
        """What a slice merged by this method has genes for."""
        each, shared = ([name for name, p in group.items() if p.is_gene] for group in (method.each, method.shared))
        merged = self.genome.merged(method)
        if method.pair:
            # Of more than two models, each has a share, and the two with the highest are merged.
            return [(model, name) for model in (merged[1:] if len(merged) == 2 else merged) for name in shared]
        return [*((model, name) for model in merged for name in each), *((None, name) for name in shared)]

    def parameters_of(self, method: Method) -> list[str]:
        """The names of the genes that a method has."""
        return [*dict.fromkeys(parameter for _, parameter in self.columns_of(method))]

    def _bounds(self, method: Method, parameter: str) -> tuple[float, float]:
        declared = declared_by(method)[parameter]
        low, high = self.genome.bounds.get(parameter) or (declared.low or 0.0, declared.high or 1.0)
        if self.genome.allow_negative_weights and parameter == "weight" and low >= 0:
            low = -high
        return low, high

    def name(self, column: Column, label: str, filter_: str | None) -> str:
        """What the gene of a column is called in one slice and filter."""
        model, parameter = column
        whose = () if model is None else (self.names[model],)
        return "/".join((*whose, label, *((filter_ or OTHER,) if len(self.filters) > 1 else ()), parameter))

    def methods(self, genes: Mapping[str, float]) -> list[Method]:
        """The method of each slice."""
        known = self.genome.methods
        chosen = {g.slice: known[int(g.clamp(genes[g.name]))] for g in self.genes if g.parameter == METHOD}
        return [chosen.get(label) or chosen.get(None) or known[0] for label in self.slices]
