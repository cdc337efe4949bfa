"""The search space: the genes of a genome with their names and bounds, and the recipes that their values mean."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmevo.errors import ConfigError, plural
from llmevo.merging.methods.registry import Method
from llmevo.merging.path import LayerPath
from llmevo.merging.recipe import BY_SLICE, PREPARE, QUESTIONS, Preparation, Recipe
from llmevo.models.references import ModelReference, short_names
from llmevo.search.genome import OTHER, Genome, declared_by, walks
from llmevo.search.mixtures import Mixtures, RouterGene, RouterSpace
from llmevo.search.paths.settings import Paths
from llmevo.search.paths.space import MERGE, PathSpace

Array = NDArray[np.float64]

Genes = dict[str, float]
"""A value for every gene, by name; of a gene with choices the place of one of them."""

Column = tuple[ModelReference | None, str]
"""A gene without its slice and filter: a model and its parameter, or no model and a parameter that all share."""

METHOD = "merge_method"  # the name of the gene that chooses among several methods
SPLIT = "split"  # the name of the gene that is the first layer with exchanged roles; the number of layers for none
ALONE = "alone"  # the parameter that stands, instead of all genes, for one model: {"model/alone": 1.0}
SHARES = ("weight", "scale", "t")  # parameters that are 0 for a model without a share in the merge
COEFFICIENTS = 3  # common weights that are tried in addition to the uniform merge's, at most
MARGIN = 1e-4  # the least distance of density ± epsilon from 0 and 1
STEP = 1e-4  # genes are multiples of this: finer differences are lost in 16-bit models, and recipes stay readable


@dataclass(frozen=True)
class Gene:
    """One number of a recipe that the search sets, or one choice."""

    name: str
    """`model/slice/parameter` or `model/slice/filter/parameter`, without a model where all share it; or `merge_method`
    for the whole recipe."""
    model: str | None
    slice: str | None
    """The layers, first and last: `0-9`; `all` when there is one slice; None for the whole recipe."""
    filter: str | None
    parameter: str
    low: float
    high: float
    choices: tuple[str, ...] = ()
    """The names to choose from; the gene's values are their places, 0, 1, 2 …"""
    is_whole: bool = False
    """Whether its values are whole numbers."""

    @cached_property
    def _decimals(self) -> int:
        """Decimals of the gene's grid, which has at least a thousand steps."""
        return max(round(-math.log10(STEP)), math.ceil(-math.log10((self.high - self.low) / 1000) - 1e-9))

    def clamp(self, value: float) -> float:
        """Return the value moved into the bounds and onto the grid."""
        inside = min(max(value, self.low), self.high)
        if self.choices or self.is_whole:
            return float(round(inside))
        step = 10.0**-self._decimals
        # Bounded again: a bound need not lie on the grid.
        return min(max(round(round(inside / step) * step, self._decimals + 2), self.low), self.high)

    def to_unit(self, value: float) -> float:
        """Return the place in [0, 1]; of a choice the middle of its share."""
        if self.choices:
            return (self.clamp(value) + 0.5) / len(self.choices)
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def from_unit(self, place: float) -> float:
        """Return the value at a place of [0, 1]."""
        if self.choices:
            return float(min(max(math.floor(place * len(self.choices)), 0), len(self.choices) - 1))
        return self.clamp(self.low + place * (self.high - self.low))

    def shown(self, value: float) -> str:
        """Return the name of a choice, or the number."""
        return self.choices[int(self.clamp(value))] if self.choices else f"{value:g}"

    def described(self) -> dict[str, Any]:
        """Return the gene's form in the log."""
        described: dict[str, Any] = {"name": self.name, "low": self.low, "high": self.high}
        return described | ({"choices": [*self.choices]} if self.choices else {})


class SearchSpace:
    """The genes of a genome over a model of some depth, and the recipes that their values mean.

    Points are `Genes` (by name) outside, and arrays in the unit cube for the optimizers, in the order of `genes`.
    """

    def __init__(self, genome: Genome, layers: int, routers: Sequence[str] = (), by_token: bool = False) -> None:
        """`routers` are filters for the routers of a mixture of experts, whose task vectors are given the weight 0, as
        routers that were trained apart send tokens to different experts; unless `genome.filters` has one for them.

        `by_token`: the models' tokens differ, so that every recipe names all models and the `tokenizer_source`. Raise
        ConfigError when `layer_granularity` does not divide `layers`.
        """
        step = genome.layer_granularity or layers
        if layers % step:
            divisors = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
            raise ConfigError(
                f"genome.layer_granularity: {step} does not divide the {plural(layers, 'layer')} of the models;"
                f" use one of {divisors}"
            )
        self.genome, self.layers, self.by_token = genome, layers, by_token
        self.names = short_names(genome.references)
        self.spans = [(start, start + step) for start in range(0, layers, step)]
        self.slices = ["all"] if len(self.spans) == 1 else [f"{start}-{stop - 1}" for start, stop in self.spans]
        own = tuple(filter_.rstrip(".") for filter_ in genome.filters or ())
        self.routers = [filter_ for filter_ in routers if not own or not filter_.rstrip(".").endswith(own)]
        self.filters: list[str | None] = [*genome.filters, None] if genome.filters else [None]
        experts = genome.experts if genome.architecture == "moe" else []
        self.routing = RouterSpace(genome.mixture or Mixtures(), experts, self.spans) if experts else None
        """The routers' part of the space; None where the candidates are no mixtures."""
        if genome.split and layers < 2:
            raise ConfigError("genome.split: the models have one layer, which cannot be split; leave it out")

    # The genes

    @property
    def merged(self) -> list[ModelReference]:
        """The models that any of the methods mixes: a base that is the origin has no task vector of its own."""
        mixed = [model for method in self.genome.methods for model in self.genome.merged(method)]
        return [model for model in dict.fromkeys([*self.genome.models, *self.genome.references]) if model in mixed]

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        genes = [] if self.genome.method_per_slice else [*self._choice(None)]
        if self.genome.split:
            genes.append(Gene(SPLIT, None, None, None, SPLIT, 1.0, float(self.layers), is_whole=True))
        genes += self._router_genes(None)
        for label in self.slices:
            if self.genome.method_per_slice:
                genes += self._choice(label)
            for model, group in groupby(self._columns.items(), key=lambda item: item[0][0]):
                columns = [*group]
                whose = None if model is None else self.names[model]
                genes += [
                    Gene(self._name(column, label, filter_), whose, label, filter_, column[1], *bounds)
                    for filter_ in self.filters
                    for column, bounds in columns
                ]
            genes += self._router_genes(label)
        return tuple(genes)

    @cached_property
    def _routing(self) -> dict[str, RouterGene]:
        """The genes of the routers, by name."""
        found: dict[str, RouterGene] = {}
        for gene in self.routing.genes if self.routing else ():
            parts = [self.names[gene.model]] if gene.model else []
            parts += [self.slices[gene.place]] if gene.place is not None else []
            found["/".join([*parts, gene.parameter])] = gene
        return found

    def _router_genes(self, label: str | None) -> list[Gene]:
        """The routers' genes of one slice, or with None those of the whole recipe."""
        return [
            Gene(
                name, of.model and self.names[of.model], label, None, of.parameter, of.low, of.high, is_whole=not label
            )
            for name, of in self._routing.items()
            if label == (None if of.place is None else self.slices[of.place])
        ]

    def _choice(self, label: str | None) -> list[Gene]:
        """The gene that chooses the method, where there are several."""
        names = tuple(method.name for method in self.genome.methods)
        if len(names) < 2:
            return []
        return [Gene(f"{label}/{METHOD}" if label else METHOD, None, label, None, METHOD, 0.0, len(names) - 1.0, names)]

    @cached_property
    def _columns(self) -> dict[Column, tuple[float, float]]:
        """The columns of a slice with their bounds, model by model and the shared ones last."""
        found: dict[Column, tuple[float, float]] = {}
        for method in self.genome.methods:
            for column in self._columns_of(method):
                low, high = self._bounds(method, column[1])
                widest = found.get(column, (low, high))
                found[column] = (min(low, widest[0]), max(high, widest[1]))
        order: list[ModelReference | None] = [*self.merged, None]
        return dict(sorted(found.items(), key=lambda item: order.index(item[0][0])))

    def _columns_of(self, method: Method) -> list[Column]:
        """The columns of a slice that is merged by this method."""
        each, shared = ([name for name, p in group.items() if p.is_gene] for group in (method.each, method.shared))
        merged = self.genome.merged(method)
        if method.pair:
            # Of more than two models, each has a share, and the two with the highest are merged.
            return [(model, name) for model in (merged[1:] if len(merged) == 2 else merged) for name in shared]
        shared += [PREPARE] if self.genome.is_prepared(method) else []
        return [*((model, name) for model in merged for name in each), *((None, name) for name in shared)]

    def parameters_of(self, method: Method) -> list[str]:
        """Return the names of a method's genes; those of routers are of every method."""
        own = [parameter for _, parameter in self._columns_of(method)]
        return [*dict.fromkeys([*own, *(gene.parameter for gene in self._routing.values() if gene.place is not None)])]

    def _bounds(self, method: Method, parameter: str) -> tuple[float, float]:
        declared = self.genome.declared(method)[parameter]
        low, high = self.genome.bounds.get(parameter) or (declared.low or 0.0, declared.high or 1.0)
        if self.genome.allow_negative_weights and parameter == "weight" and low >= 0:
            low = -high
        return low, high

    def _name(self, column: Column, label: str, filter_: str | None) -> str:
        model, parameter = column
        whose = () if model is None else (self.names[model],)
        return "/".join((*whose, label, *((filter_ or OTHER,) if len(self.filters) > 1 else ()), parameter))

    def keeps_routers(self, method: Method) -> bool:
        """Return whether a method leaves the routers of a mixture of experts as they are in the base."""
        return bool(self.routers) and method.keeps_base

    def methods(self, genes: Mapping[str, float]) -> list[Method]:
        """Return the method of each slice."""
        known = self.genome.methods
        chosen = {g.slice: known[int(g.clamp(genes[g.name]))] for g in self.genes if g.parameter == METHOD}
        return [chosen.get(label) or chosen.get(None) or known[0] for label in self.slices]

    # Points

    def clamp(self, genes: Mapping[str, float]) -> Genes:
        """Return the values moved into their bounds and onto their grid."""
        return {g.name: g.clamp(genes[g.name]) for g in self.genes}

    def contains(self, genes: Mapping[str, float]) -> bool:
        return all(g.name in genes and g.low <= genes[g.name] <= g.high for g in self.genes)

    def to_unit(self, genes: Mapping[str, float]) -> Array:
        """Return the point of the unit cube."""
        return np.array([g.to_unit(genes[g.name]) for g in self.genes])

    def from_unit(self, point: Array) -> Genes:
        """Return the values of a point, clipped into the bounds."""
        return {g.name: g.from_unit(float(x)) for g, x in zip(self.genes, point, strict=True)}

    def active(self, genes: Mapping[str, float]) -> NDArray[np.bool_]:
        """Return which genes the recipe of these values depends on: those of the chosen methods."""
        used = {
            self._name(column, label, filter_)
            for label, method in zip(self.slices, self.methods(genes), strict=True)
            for column in self._columns_of(method)
            for filter_ in self.filters
        } | self._routing.keys()
        return np.array([bool(gene.choices) or gene.name == SPLIT or gene.name in used for gene in self.genes])

    # Start rows

    def uniform(self) -> Genes:
        """Return the uniform merge: weight 1/n, t half-way, nothing trimmed, and the first of several methods."""
        return {g.name: 0.0 if g.choices else self._start(g) for g in self.genes}

    def coefficients(self) -> dict[float, Genes]:
        """Return {weight: merge with that weight for all models} in addition to the uniform merge.

        In task arithmetic this weight is the scaling coefficient (Ilharco et al., https://arxiv.org/abs/2212.04089),
        which decides most of a merge's score: the mean of the task vectors (the uniform merge) is mostly too small, and
        their sum (weight 1) too large. Between these two lie up to three weights in equal ratios of at least √2: 0.35,
        0.5 and 0.71 for four models, two weights for three models, and 0.71 for two. At 1/√n the merged task vector is
        as long as the models', where these are orthogonal and of equal length. An upper bound below 1 replaces 1.
        Where a preparation makes the sum of the task vectors its own merge (RegMean), the weights lie around 1: 0.71, 1
        and 1.41, as far as the bounds go.

        Only for the first method that adds weighted task vectors to the base without `normalize` (`Genome.scales`);
        empty where there is none. All other genes are as in the uniform merge.
        """
        methods = self.genome.methods
        place = next((place for place, method in enumerate(methods) if self.genome.scales(method)), None)
        weights = [gene for gene in self.genes if gene.parameter == "weight"]
        if place is None or not weights:
            return {}
        low, high = max(1 / len(self.genome.merged(methods[place])), weights[0].low), weights[0].high
        if self.genome.sums_to_merge(methods[place]):
            found = [0.71, 1.0, 1.41]
        else:
            high = min(1.0, high)
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

    @property
    def typical(self) -> Recipe:
        """Return the recipe that stands for the others where something is measured in a merge: the sum of the prepared
        task vectors where that is a merge of its own (RegMean) and a point of the space, else the uniform merge.
        """
        method = self.genome.methods[0]
        rows = self.coefficients() if self.genome.sums_to_merge(method) else {}
        return self.decode(rows.get(1.0) or self.uniform())

    def _start(self, gene: Gene) -> float:
        """The value of a gene in the uniform merge by the first method that has it."""
        if gene.name == SPLIT:
            return gene.high
        if gene.name in self._routing:
            return self._routing[gene.name].start
        for method in self.genome.methods:
            declared = self.genome.declared(method).get(gene.parameter)
            if declared is None or not declared.is_gene:
                continue
            if declared.start is not None:
                return declared.start
            if gene.parameter in method.each:
                return round(1 / len(self.genome.merged(method)), 6)
            return ((declared.low or 0.0) + (declared.high or 1.0)) / 2
        raise KeyError(gene.name)

    def parent(self, model: ModelReference) -> Genes:
        """Return the genes at which the merge is that model alone; `{"model/alone": 1.0}`, no point of the space, where
        the methods have none, and where every point has the base's routers.
        """
        name = self.names[model]
        for place, method in enumerate(self.genome.methods if self.routing is None else ()):
            if self.keeps_routers(method):
                continue
            weighted = walks(method) or "weight" in method.each or "scale" in method.each
            unscaled = self.genome.parameters.get("lambda", 1.0) == 1.0
            if self.genome.is_prepared(method) and self._bounds(method, PREPARE)[0] > 0.0:
                continue
            if weighted and unscaled and model in self.genome.merged(method):
                return {
                    g.name: float(place)
                    if g.choices
                    else float(g.model == name)
                    if g.parameter in SHARES
                    else 0.0
                    if g.parameter == PREPARE
                    else self._start(g)
                    for g in self.genes
                }
        return {f"{name}/{ALONE}": 1.0}

    # Recipes

    @cached_property
    def paths(self) -> PathSpace:
        """The layer paths over the models. Raises ConfigError where they can have none."""
        if self.by_token:
            raise ConfigError("genome.path: the models' tokens differ, and a path has the tokens of one of them")
        if self.genome.prepare:
            raise ConfigError(
                "genome.prepare: layer paths are of the models as they are; leave out prepare, or the paths"
            )
        if self.genome.smooth:
            raise ConfigError("genome.path: smooth has no meaning on some of the layers; leave it out")
        return PathSpace(self.genome.path or Paths(), self.layers, self.names)

    def decode(self, genes: Mapping[str, float], path: str = "") -> Recipe:
        """Return the recipe that these values mean; with a `path` that of the path, where they mean its merge."""
        genome = self.genome
        if path:
            named: dict[str, ModelReference | Recipe] = {**self.paths.models}
            if genes:
                named[MERGE] = self.decode(genes).model_copy(update={"dtype": None})
            return LayerPath.parse(path).recipe(named, dtype=genome.dtype)
        for model, name in self.names.items():
            if f"{name}/{ALONE}" in genes:
                return self.alone(model)
        methods = self.methods(genes)
        same = all(method.name == methods[0].name for method in methods)
        if genome.smooth:  # one slice over all layers, its values gradients
            slices = [self._slice(genes, methods[0], range(len(self.spans)), same=True)]
        else:
            slices = [of for place, method in enumerate(methods) for of in self._split(genes, method, place, same)]
        # Of a pair every slice names its own base. Among several methods the donor of config and tokenizer stays one.
        base = None if genome.methods == [methods[0]] and methods[0].pair else genome.base_model
        return Recipe.model_validate(
            {
                "merge_method": methods[0].name if same else BY_SLICE,
                "base_model": base,
                "slices": slices,
                "parameters": (self._fixed(methods[0]) if same else {}) or None,
                "prepare": self.preparation if any(map(genome.is_prepared, methods)) else None,
                "mixture": self._mixture(genes),
                "tokenizer_source": self._tokenizer_source,
                "dtype": genome.dtype,
            }
        )

    def _mixture(self, genes: Mapping[str, float]) -> dict[str, Any] | None:
        values = {(of.model, of.place, of.parameter): genes[name] for name, of in self._routing.items()}
        return self.routing.mixture(values) if self.routing else None

    def routing_values(self, recipe: Recipe) -> Genes:
        """Return the values of the routers' genes in a recipe. Raises ValueError for other experts, or none."""
        if self.routing is None:
            return {}
        given = recipe.mixture
        if given is None or [*given.experts] != [*self.routing.experts]:
            raise ValueError(f"its experts are not {', '.join(self.names[of] for of in self.routing.experts)}")
        found: Genes = {}
        for name, gene in self._routing.items():
            of = None if gene.place is None else given.router_slice(self.spans[gene.place][0])
            if gene.place is None:
                found[name] = float(given.experts_per_token)
            elif gene.model is None:
                found[name] = of.temperature if of else 1.0
            else:
                found[name] = of.bias[self.routing.experts.index(gene.model)] if of and of.bias else 0.0
        return found

    @property
    def preparation(self) -> Preparation | None:
        """The genome's `prepare`, with the search questions as its `text` if it needs and names none."""
        given = self.genome.prepare
        if given is None or given.text or not given.reads_text:
            return given
        return given.model_copy(update={"text": QUESTIONS})

    def sum_of_prepared(self) -> Recipe | None:
        """Return the sum of all prepared models, a recipe of the same prepared models as every candidate's."""
        genome = self.genome
        method = next(filter(genome.is_prepared, genome.methods), None)
        if method is None:
            return None
        models = [{"model": model, "parameters": {"weight": 1.0}} for model in genome.merged(method)]
        given = {"merge_method": "task_arithmetic", "base_model": genome.base_model, "models": models}
        return Recipe.model_validate({**given, "prepare": self.preparation, "dtype": genome.dtype})

    @property
    def _tokenizer_source(self) -> ModelReference | str | None:
        # `base` is the donor's anyway, and so is `union` where all models have the same tokens; a recipe with either
        # would lose the embeddings beyond the last token.
        source = self.genome.tokenizer_source
        return None if source == "base" or (source == "union" and not self.by_token) else source

    def alone(self, model: ModelReference) -> Recipe:
        """Return the recipe of one model alone; by token with all tokens, and the other models at weight 0."""
        genome = self.genome
        if not self.by_token:
            alone = Recipe.of_one(model, genome.dtype)
            mixture = self.routing and self.routing.copies(model)
            return Recipe.model_validate({**alone.as_dict(), "mixture": mixture}) if mixture else alone
        uniform = self.decode(self.uniform())
        every = dict.fromkeys([*uniform.references, *genome.references])
        return Recipe.model_validate(
            {
                "merge_method": "linear",
                "base_model": uniform.base_model,
                "models": [{"model": each, "parameters": {"weight": float(each == model)}} for each in every],
                "tokenizer_source": self._tokenizer_source,
                "dtype": genome.dtype,
            }
        )

    def _fixed(self, method: Method) -> dict[str, float | bool]:
        """The parameters of the whole merge that are no genes."""
        own = {name for name, parameter in declared_by(method).items() if not parameter.is_gene}
        fixed = {name: value for name, value in self.genome.parameters.items() if name in own}
        if "normalize" in method.shared:
            fixed["normalize"] = self.genome.normalizes(method)
        return fixed

    def _split(self, genes: Mapping[str, float], method: Method, place: int, same: bool) -> list[dict[str, Any]]:
        """The slice of one of the genes' slices, or two where the models change roles inside."""
        start, stop = self.spans[place]
        at = min(max(int(genes.get(SPLIT, stop)), start), stop)
        parts = ((genes, (start, at)), (self.exchanged(genes) if at < stop else genes, (at, stop)))
        return [self._slice(own, method, [place], same, span) for own, span in parts if span[0] < span[1]]

    def exchanged(self, genes: Mapping[str, float]) -> Genes:
        """Return the values with which the two groups of `genome.split` have changed roles; of itself the inverse."""
        first, second = self.genome.groups
        partner = {**dict(zip(first, second, strict=True)), **dict(zip(second, first, strict=True))}
        found = dict(genes)
        for label in self.slices:
            for (model, parameter), filter_ in ((column, f) for column in self._columns for f in self.filters):
                name = self._name((model, parameter), label, filter_)
                other = (partner.get(model), parameter) if model else None
                if other in self._columns:
                    found[name] = genes[self._name(other, label, filter_)]
                elif other and parameter == "t":  # of slerp between two models
                    found[name] = round(1.0 - genes[name], 6)
        return found

    def _slice(
        self,
        genes: Mapping[str, float],
        method: Method,
        places: Sequence[int],
        same: bool,
        span: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """One slice of the recipe, over one or several of the genes' slices, or a part of one."""
        span = span or (self.spans[places[0]][0], self.spans[places[-1]][1])
        mixed = self._pair(genes, method, places) if method.pair else self._mix(genes, method, places)
        sources = [{**source, "layer_range": span} for source in mixed.pop("sources")]
        base = self.genome.base_model
        if base is not None and not method.pair and self.genome.has_origin(method):
            sources.append({"model": base, "layer_range": span})  # mergekit wants the base among the sources of a slice
        own = {} if same else {"merge_method": method.name}
        parameters = {**({} if same else self._fixed(method)), **mixed.pop("parameters")}
        if not same and self.genome.prepare and not self.genome.is_prepared(method):
            parameters[PREPARE] = 0.0
        return {**own, **mixed, "sources": sources, "parameters": parameters or None}

    def _mix(self, genes: Mapping[str, float], method: Method, places: Sequence[int]) -> dict[str, Any]:
        """The models with their own parameters, and the shared ones."""
        each: dict[ModelReference, dict[str, Any]] = {model: {} for model in self.genome.merged(method)}
        shared: dict[str, Any] = {}
        for column in self._columns_of(method):
            model, parameter = column
            (shared if model is None else each[model])[parameter] = self._values(genes, column, places)
        for own in each.values():
            if {"density", "epsilon"} <= own.keys():
                _project(own["density"], own["epsilon"])

        def routed(parameter: str) -> bool:
            return parameter == "weight" and self.keeps_routers(method)

        return {
            "sources": [
                {"model": model, "parameters": {n: self._setting(v, routed(n)) for n, v in own.items()} or None}
                for model, own in each.items()
            ],
            "parameters": {name: self._setting(values) for name, values in shared.items()},
        }

    def _pair(self, genes: Mapping[str, float], method: Method, places: Sequence[int]) -> dict[str, Any]:
        """Two models: the only two, or in a single slice the two with the highest genes.

        Of more than two, the one with the highest gene is the base, and t is the second's share of their sum.
        (mergekit-evolve takes a softmax of genes in [0, 1], which leaves t in [0.269, 0.5] only.)
        """
        models = self.genome.merged(method)
        if len(models) == 2:
            first, second = models
            names = [parameter for _, parameter in self._columns_of(method)]
            shared = {name: self._setting(self._values(genes, (second, name), places)) for name in names}
        else:
            share = {model: self._values(genes, (model, "t"), places)[0][0] for model in models}
            first, second = sorted(models, key=lambda model: -share[model])[:2]
            total = share[first] + share[second]
            shared = {"t": share[second] / total if total > 0 else 0.5}
        return {"sources": [{"model": first}, {"model": second}], "base_model": first, "parameters": shared}

    def _values(self, genes: Mapping[str, float], column: Column, places: Sequence[int]) -> list[list[float]]:
        """The values of one column (filters, slices)."""
        return [[genes[self._name(column, self.slices[i], filter_)] for i in places] for filter_ in self.filters]

    def _setting(self, values: Sequence[Sequence[float]], routed: bool = False) -> Any:
        """A number, or a gradient over several slices; by filter where there are filters, also 0 for the routers."""
        settings = [by_slice[0] if len(by_slice) == 1 else [*by_slice] for by_slice in values]
        fixed = [{"filter": filter_, "value": 0.0} for filter_ in self.routers] if routed else []
        if len(self.filters) == 1 and not fixed:
            return settings[0]
        return fixed + [{"filter": f, "value": value} for f, value in zip(self.filters, settings, strict=True)]


def _project(densities: list[list[float]], epsilons: list[list[float]]) -> None:
    """Move DELLA's densities and epsilons (filters, slices) to where density ± epsilon lies inside (0, 1).

    Between such points all interpolated ones are such as well. Density 1 is exempt, for nothing is dropped then; but
    a gradient that ends there would come arbitrarily close to 1, and so stops short of it.
    """
    for density, epsilon in zip(densities, epsilons, strict=True):
        whole = all(value >= 1 - MARGIN for value in density)
        for place, value in enumerate(density):
            density[place] = 1.0 if whole else min(max(value, 0.0), 1 - 2 * MARGIN)
            room = min(density[place], 1 - density[place]) - MARGIN
            epsilon[place] = max(0.0, min(epsilon[place], round(room, 6)))
