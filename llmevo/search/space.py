"""The genes of a genome: what the search may set, under which name and between which bounds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmevo.errors import ConfigError, plural
from llmevo.merging.methods.registry import Method
from llmevo.merging.recipe import BY_SLICE, Recipe
from llmevo.models.references import ModelReference
from llmevo.search.genome import OTHER, Genome, declared_by, walks

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


ALONE = "alone"
"""The parameter that stands, instead of all genes, for one model merged with nothing: `{"model/alone": 1.0}`."""


MARGIN = 1e-4
"""How far density ± epsilon stays away from 0 and 1."""


def decode(layout: Layout, genes: Mapping[str, float]) -> Recipe:
    """The recipe that these values mean."""
    genome = layout.genome
    for model, name in layout.names.items():
        if f"{name}/{ALONE}" in genes:
            return Recipe.of_one(model, genome.dtype)
    methods = layout.methods(genes)
    same = all(method.name == methods[0].name for method in methods)
    if genome.smooth:  # one slice over all layers, its values gradients
        slices = [_slice(layout, genes, methods[0], range(len(layout.spans)), same=True)]
    else:
        slices = [_slice(layout, genes, method, [place], same) for place, method in enumerate(methods)]
    fixed = _fixed(layout, methods[0]) if same else {}
    # Of a pair every slice names its own base. Among several methods the donor of config and tokenizer stays one.
    base = None if genome.methods == [methods[0]] and methods[0].pair else genome.base_model
    return Recipe.model_validate(
        {
            "merge_method": methods[0].name if same else BY_SLICE,
            "base_model": base,
            "slices": slices,
            "parameters": fixed or None,
            # `base` is the donor's anyhow, and so is `union` where all models have one vocabulary, which the scorer
            # checks; a recipe that says so loses the embeddings beyond the last token.
            "tokenizer_source": None if genome.tokenizer_source in ("base", "union") else genome.tokenizer_source,
            "dtype": genome.dtype,
        }
    )


def _fixed(layout: Layout, method: Method) -> dict[str, float | bool]:
    """The parameters of the whole merge that are no genes."""
    own = {name for name, parameter in declared_by(method).items() if not parameter.is_gene}
    fixed = {name: value for name, value in layout.genome.parameters.items() if name in own}
    if "normalize" in method.shared:
        fixed["normalize"] = layout.genome.normalizes(method)
    return fixed


def _slice(
    layout: Layout, genes: Mapping[str, float], method: Method, places: Sequence[int], same: bool
) -> dict[str, Any]:
    """One slice of the result, over one of the genes' slices or several; it says its method where they differ."""
    span = layout.spans[places[0]][0], layout.spans[places[-1]][1]
    mixed = _pair(layout, genes, method, places) if method.pair else _mix(layout, genes, method, places)
    sources = [{**source, "layer_range": span} for source in mixed.pop("sources")]
    base = layout.genome.base_model
    if base is not None and not method.pair and layout.genome.has_origin(method):
        # mergekit wants the base among the sources of a slice.
        sources.append({"model": base, "layer_range": span})
    own = {} if same else {"merge_method": method.name}
    parameters = {**({} if same else _fixed(layout, method)), **mixed.pop("parameters")}
    return {**own, **mixed, "sources": sources, "parameters": parameters or None}


def _mix(layout: Layout, genes: Mapping[str, float], method: Method, places: Sequence[int]) -> dict[str, Any]:
    """The models with their own parameters, and the shared ones."""
    each: dict[ModelReference, dict[str, Any]] = {model: {} for model in layout.genome.merged(method)}
    shared: dict[str, Any] = {}
    for column in layout.columns_of(method):
        model, parameter = column
        (shared if model is None else each[model])[parameter] = _values(layout, genes, column, places)
    for own in each.values():
        if {"density", "epsilon"} <= own.keys():
            project(own["density"], own["epsilon"])
    return {
        "sources": [
            {"model": model, "parameters": {name: _setting(layout, v) for name, v in own.items()} or None}
            for model, own in each.items()
        ],
        "parameters": {name: _setting(layout, values) for name, values in shared.items()},
    }


def _values(layout: Layout, genes: Mapping[str, float], column: Column, places: Sequence[int]) -> list[list[float]]:
    """The values of one column: for every filter those of the slices."""
    return [[genes[layout.name(column, layout.slices[i], filter_)] for i in places] for filter_ in layout.filters]


def _setting(layout: Layout, values: Sequence[Sequence[float]]) -> Any:
    """A number, or a gradient over several slices; by filter where there are filters."""
    settings = [by_slice[0] if len(by_slice) == 1 else [*by_slice] for by_slice in values]
    if len(layout.filters) == 1:
        return settings[0]
    return [{"filter": filter_, "value": value} for filter_, value in zip(layout.filters, settings, strict=True)]


def _pair(layout: Layout, genes: Mapping[str, float], method: Method, places: Sequence[int]) -> dict[str, Any]:
    """Two models: the only two, or in a single slice the two with the highest genes.

    Of more than two, the one with the highest gene is the base, and t is the second's share of their sum.
    (mergekit-evolve takes a softmax of genes in [0, 1], which leaves t in [0.269, 0.5] only.)
    """
    models = layout.genome.merged(method)
    if len(models) == 2:
        first, second = models
        names = [parameter for _, parameter in layout.columns_of(method)]
        shared = {name: _setting(layout, _values(layout, genes, (second, name), places)) for name in names}
    else:
        share = {model: _values(layout, genes, (model, "t"), places)[0][0] for model in models}
        first, second = sorted(models, key=lambda model: -share[model])[:2]
        total = share[first] + share[second]
        shared = {"t": share[second] / total if total > 0 else 0.5}
    return {"sources": [{"model": first}, {"model": second}], "base_model": first, "parameters": shared}


def project(densities: list[list[float]], epsilons: list[list[float]]) -> None:
    """Move DELLA's densities and epsilons, by filter and slice, to where density ± epsilon lies inside (0, 1).

    Between such points all interpolated ones are such as well. Density 1 is exempt, for nothing is dropped then; but
    a gradient that ends there would come arbitrarily close to 1, and so stops short of it.
    """
    for density, epsilon in zip(densities, epsilons, strict=True):
        whole = all(value >= 1 - MARGIN for value in density)
        for place, value in enumerate(density):
            density[place] = 1.0 if whole else min(max(value, 0.0), 1 - 2 * MARGIN)
            room = min(density[place], 1 - density[place]) - MARGIN
            epsilon[place] = max(0.0, min(epsilon[place], round(room, 6)))


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
