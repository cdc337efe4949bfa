"""The search space: named genes, their bounds, and the recipe that a set of values means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from llmevo.errors import ConfigError, nearest
from llmevo.methods import METHODS, Method
from llmevo.recipe import DTYPES, Recipe
from llmevo.references import ModelReference

Genes = dict[str, float]
"""A value for every gene, by name."""

OTHER = "other"
"""The name of the catch-all filter: the tensors that none of the filters matches."""

STEP = 1e-4
"""Genes are multiples of this: finer differences are lost in any 16-bit model, and recipes stay readable."""


class Genome(BaseModel):
    """The `genome:` of a config; every key of mergekit-evolve and LLM-Evo-Merge means the same here."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    models: list[ModelReference] = Field(min_length=1)
    """The models to merge."""
    merge_method: str
    """One of llmevo's merge methods."""
    base_model: ModelReference | None = None
    """The model they were fine-tuned from; required by methods on task vectors."""
    tokenizer_source: ModelReference | str | None = None
    """`base` (the default) or a model: whose tokenizer the result gets."""
    layer_granularity: int = Field(default=0, ge=0)
    """Layers a slice; each slice has its own genes. 0: one slice for all layers. Must divide the layer count."""
    normalize: bool | None = None
    """Divide by the sum of the weights. Default: yes for linear, ties and dare_ties, no for task_arithmetic."""
    allow_negative_weights: bool = False
    """Let weights go below 0, as far as they go above."""
    filters: list[str] | None = None
    """Parts of tensor names (`self_attn`, `mlp`) that get genes of their own, beside one set for all the others."""
    smooth: bool = False
    """Interpolate between the slices' values over the layers instead of keeping each constant."""
    bounds: dict[str, tuple[float, float]] = Field(default_factory=dict[str, tuple[float, float]])
    """Lowest and highest value of a parameter's genes, by parameter; the method's own by default."""
    parameters: dict[str, float | bool] = Field(default_factory=dict[str, float | bool])
    """Fixed values for the method's other parameters, such as `lambda` or `rescale`."""
    dtype: str = "bfloat16"
    """The type of the merged weights."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.merge_method not in METHODS:
            raise ValueError(f"merge_method {self.merge_method!r} is unknown{nearest(self.merge_method, METHODS)}")
        method = METHODS[self.merge_method]
        if method.takes_base and self.base_model is None:
            raise ValueError(f"base_model is missing: {self.merge_method} merges what the models add to their base")
        if method.pair and (self.filters or self.smooth):
            raise ValueError(f"filters and smooth do not go with {self.merge_method}; leave them out")
        if method.pair and len(self.models) < 2:
            raise ValueError(f"{self.merge_method} needs at least two models")
        if repeated := [str(model) for model in self.models if self.models.count(model) > 1]:
            raise ValueError(f"models: {repeated[0]} is listed twice; list every model once")
        if method.takes_base and self.models == [self.base_model]:
            raise ValueError("models: there is none to merge beside the base_model")
        if len({*(self.filters or []), OTHER}) <= len(self.filters or []):
            raise ValueError(f"filters: every one once, and none called {OTHER!r}; got {self.filters}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is unknown{nearest(self.dtype, DTYPES)}")
        genes = [name for name, parameter in self._declared(method).items() if parameter.is_gene]
        for name, (low, high) in self.bounds.items():
            if name not in genes:
                raise ValueError(f"bounds: {self.merge_method} has no gene {name!r}{nearest(name, genes)}")
            if not low < high:
                raise ValueError(f"bounds: {name} needs a lower and a higher number, got [{low}, {high}]")
        fixed = [name for name, parameter in self._declared(method).items() if not parameter.is_gene]
        for name in self.parameters:
            if name not in fixed:
                raise ValueError(f"parameters: {self.merge_method} has no {name!r} to fix{nearest(name, fixed)}")
        if self.tokenizer_source == "union":
            raise ValueError("tokenizer_source 'union' is not supported: the models need one vocabulary; use 'base'")
        return self

    @staticmethod
    def _declared(method: Method) -> Mapping[str, Any]:
        return {**method.each, **method.shared}

    @property
    def method(self) -> Method:
        return METHODS[self.merge_method]

    @property
    def references(self) -> list[ModelReference]:
        """Every model of the search, once, the donor of config and tokenizer first."""
        return [*dict.fromkeys([*([self.base_model] if self.base_model else []), *self.models])]


@dataclass(frozen=True)
class Gene:
    """One number of a recipe that the search may set."""

    name: str
    """`model/slice/parameter`, or `model/slice/filter/parameter`."""
    model: str
    slice: str
    """The layers, first and last: `0-9`; `all` when there is one slice."""
    filter: str | None
    parameter: str
    low: float
    high: float


def short_names(references: Sequence[ModelReference]) -> dict[ModelReference, str]:
    """What people call each model: its last path part, with the parent folder's where two would be alike."""
    names = [reference.name for reference in references]
    unique: dict[ModelReference, str] = {}
    for reference, name in zip(references, names, strict=True):
        parent = Path((reference.lora or reference.model).path).parent.name
        longer = f"{parent}-{name}" if names.count(name) > 1 and parent else name
        unique[reference] = longer if longer not in unique.values() else f"{longer}-{len(unique)}"
    return unique


class SearchSpace:
    """The genes of a genome over a model of some depth, and what their values mean.

    Points are `Genes` (by name) outside, and arrays in the unit cube for the optimizers, in the order of `genes`.
    """

    def __init__(self, genome: Genome, layers: int) -> None:
        """Raises ConfigError when `layer_granularity` does not divide `layers`."""
        step = genome.layer_granularity or layers
        if layers % step:
            divisors = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
            raise ConfigError(
                f"genome.layer_granularity: {step} does not divide the {layers} layers of the models;"
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
        """The models that have genes: a base listed among the models has no task vector of its own."""
        return [m for m in self.genome.models if not (self.genome.method.takes_base and m == self.genome.base_model)]

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        method = self.genome.method
        models = self.merged[1:] if method.pair and len(self.merged) == 2 else self.merged
        return tuple(
            self._gene(model, label, filter_, parameter)
            for label in self.slices
            for model in models
            for filter_ in self.filters
            for parameter, declared in {**method.each, **method.shared}.items()
            if declared.is_gene
        )

    def _gene(self, model: ModelReference, label: str, filter_: str | None, parameter: str) -> Gene:
        declared = {**self.genome.method.each, **self.genome.method.shared}[parameter]
        low, high = self.genome.bounds.get(parameter) or (declared.low or 0.0, declared.high or 1.0)
        if self.genome.allow_negative_weights and parameter == "weight" and low >= 0:
            low = -high
        part = (filter_ or OTHER,) if len(self.filters) > 1 else ()
        name = self.names[model]
        return Gene("/".join((name, label, *part, parameter)), name, label, filter_, parameter, low, high)

    def clamp(self, genes: Mapping[str, float]) -> Genes:
        """The values moved into their bounds and onto the grid of `STEP`; the form in which genes are kept."""
        # Bounded again at the end: a bound need not lie on the grid.
        inside = {g.name: min(max(genes[g.name], g.low), g.high) for g in self.genes}
        return {g.name: min(max(round(round(inside[g.name] / STEP) * STEP, 6), g.low), g.high) for g in self.genes}

    def contains(self, genes: Mapping[str, float]) -> bool:
        return all(g.low <= genes[g.name] <= g.high for g in self.genes)

    def to_unit(self, genes: Mapping[str, float]) -> NDArray[np.float64]:
        """The point in the unit cube, clipped to it."""
        return np.array([np.clip((genes[g.name] - g.low) / (g.high - g.low), 0.0, 1.0) for g in self.genes])

    def from_unit(self, point: NDArray[np.float64]) -> Genes:
        """The values of a point, clipped into the bounds."""
        return self.clamp({g.name: g.low + float(x) * (g.high - g.low) for g, x in zip(self.genes, point, strict=True)})

    def uniform(self) -> Genes:
        """All models alike: weight 1/n, t half-way, nothing trimmed. mergekit-evolve's starting point."""
        share = 0.5 if self.genome.method.pair else 1 / len(self.merged)
        return {g.name: 1.0 if g.parameter == "density" else round(share, 6) for g in self.genes}

    def parent(self, model: ModelReference) -> Genes:
        """The genes at which the merge is that model alone."""
        name = self.names[model]
        return {g.name: 1.0 if g.parameter == "density" or g.model == name else 0.0 for g in self.genes}

    def decode(self, genes: Mapping[str, float]) -> Recipe:
        """The recipe that these values mean."""
        genome = self.genome
        if genome.method.pair:
            parts: dict[str, Any] = {"slices": [self._pair(genes, place) for place in range(len(self.spans))]}
        elif genome.smooth:
            parts = {"models": [{"model": model, "parameters": self._gradients(genes, model)} for model in self.merged]}
        else:
            parts = {"slices": [self._slice(genes, place) for place in range(len(self.spans))]}
        normalize = genome.method.normalize if genome.normalize is None else genome.normalize
        shared = {**genome.parameters, **({"normalize": normalize} if "normalize" in genome.method.shared else {})}
        return Recipe.model_validate(
            {
                "merge_method": genome.merge_method,
                "base_model": None if genome.method.pair else genome.base_model,
                **parts,
                "parameters": shared or None,
                "tokenizer_source": genome.tokenizer_source,
                "dtype": genome.dtype,
            }
        )

    def _slice(self, genes: Mapping[str, float], place: int) -> dict[str, Any]:
        """One slice with constant values."""
        sources = [
            {
                "model": model,
                "layer_range": self.spans[place],
                "parameters": {p: self._setting(genes, model, p, [place]) for p in self.genome.method.each},
            }
            for model in self.merged
        ]
        base = self.genome.base_model
        if base is not None and self.genome.method.takes_base:
            # mergekit wants the base among the sources of a slice.
            sources.append({"model": base, "layer_range": self.spans[place]})
        return {"sources": sources}

    def _gradients(self, genes: Mapping[str, float], model: ModelReference) -> dict[str, Any]:
        places = range(len(self.spans))
        return {p: self._setting(genes, model, p, places) for p in self.genome.method.each}

    def _setting(self, genes: Mapping[str, float], model: ModelReference, parameter: str, places: Sequence[int]) -> Any:
        """A number, or a gradient over several slices; by filter where there are filters."""

        def over(filter_: str | None) -> float | list[float]:
            part = (filter_ or OTHER,) if len(self.filters) > 1 else ()
            values = [genes["/".join((self.names[model], self.slices[i], *part, parameter))] for i in places]
            return values[0] if len(values) == 1 else values

        if len(self.filters) == 1:
            return over(None)
        return [{"filter": filter_, "value": over(filter_)} for filter_ in self.filters]

    def _pair(self, genes: Mapping[str, float], place: int) -> dict[str, Any]:
        """One slice between two models: the only two, or the two with the highest genes.

        Of more than two, the one with the highest gene is the base, and t is the second's share of their sum.
        (mergekit-evolve takes a softmax of genes in [0, 1], which leaves t in [0.269, 0.5] only.)
        """
        label, models = self.slices[place], self.merged
        if len(models) == 2:
            first, second = models
            t = genes[f"{self.names[second]}/{label}/t"]
        else:
            share = {model: genes[f"{self.names[model]}/{label}/t"] for model in models}
            first, second = sorted(models, key=lambda model: -share[model])[:2]
            total = share[first] + share[second]
            t = share[second] / total if total > 0 else 0.5
        return {
            "sources": [{"model": model, "layer_range": self.spans[place]} for model in (first, second)],
            "base_model": first,
            "parameters": {"t": t},
        }
