"""From genes to a recipe."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmevo.genes import Column, Layout
from llmevo.genome import declared_by
from llmevo.methods import Method
from llmevo.recipe import BY_SLICE, Recipe
from llmevo.references import ModelReference

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
            # `base` is the donor's anyhow, and so is `union` where all models have one vocabulary, which the rig
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
