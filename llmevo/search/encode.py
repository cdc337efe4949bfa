"""From a recipe to genes, the inverse of `SearchSpace.decode`: for the user's own start rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from llmevo.errors import ConfigError, RecipeError, nearest, plural
from llmevo.llm.json import numeral
from llmevo.merging.path import LayerPath
from llmevo.merging.plan import Step, plan
from llmevo.merging.recipe import PREPARE, Recipe
from llmevo.models.gains import Branches
from llmevo.search.paths.space import MERGE
from llmevo.search.space import SHARES, SPLIT, Gene, Genes, SearchSpace
from llmevo.search.trial import Suggestion

PATH = "path"
"""The key of a layer path in its text form, in `search.start_from`."""

Values = dict[tuple[str | None, str], float]
"""The parameters of one tensor: {(model, or None where all share it; name): value}."""

TOLERANCE = 1e-3  # between a decoded parameter and the user's: genes lie on a grid, and DELLA avoids its limits


def read_start(
    space: SearchSpace,
    entry: Path | Mapping[str, float | str],
    root: Path,
    tensors: Sequence[str],
    branches: Callable[[], Branches | None] = lambda: None,
) -> Suggestion:
    """Return the candidate that an entry of `search.start_from` is. Raise ConfigError where the space lacks it.

    `tensors` are the names in the models' checkpoint; `branches` returns its branches, for a path whose gains are
    written as mergekit's scales.
    """
    name = entry.stem if isinstance(entry, Path) else PATH if PATH in entry else "genes"
    try:
        if not isinstance(entry, Path) and (text := entry.get(PATH)) is not None:
            if len(entry) > 1:
                raise ValueError("give a path alone; layers of the merge have the weights of the uniform merge")
            return _along(space, space.paths.parse(str(text)), name)
        if isinstance(entry, Path):
            try:
                recipe = Recipe.from_yaml((root / entry).read_text(), "recipe")
            except (OSError, UnicodeDecodeError) as error:
                raise RecipeError(f"cannot be read ({error})") from error
            if space.genome.path and recipe.slices and _is_path(space, recipe):
                path = LayerPath.of_recipe(recipe, space.paths.models, branches())
                space.paths.check(path)
                return _along(space, path, name)
            return Suggestion(encode(space, recipe, tensors), "user", name)
        choices = {gene.name: gene.choices for gene in space.genes}
        genes = {key: _number(value, choices.get(key, ())) for key, value in entry.items()}
        return Suggestion(_bounded(space, _complete(space, genes)), "user", name)
    except RecipeError as error:
        raise ConfigError(f"search.start_from: {name if name == PATH else entry}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"search.start_from: {name} is no point of this search space: {error}") from error


def _is_path(space: SearchSpace, recipe: Recipe) -> bool:
    """Return whether the slices of a recipe are layers of models, or not as many as the models have."""
    slices = recipe.slices or []
    alone = all(recipe.method_of(of).name == "passthrough" for of in slices)
    return alone or sum(of.depth for of in slices) != space.layers


def _along(space: SearchSpace, path: LayerPath, name: str) -> Suggestion:
    """The candidate of a path. Raises RecipeError for one with other edits than the search may make."""
    space.paths.check_edits(path)
    uses = any(segment.model == MERGE for segment in path.segments)
    return Suggestion(space.clamp(space.uniform()) if uses else {}, "user", name, path=str(path))


def encode(space: SearchSpace, recipe: Recipe, tensors: Sequence[str]) -> Genes:
    """Return the genes that mean this recipe. Raise ValueError with the part of it that no genes mean."""
    for reference in recipe.references:
        if reference not in space.names:
            known = ", ".join(map(str, space.names))
            raise ValueError(f"the genome has no model {reference}; references are written as the config does: {known}")
    if recipe.rope:
        raise ValueError("it changes the rotary embedding (rope), and no gene does; give its layers as a path")
    if recipe.prepare and recipe.prepare.steps != (space.genome.prepare and space.genome.prepare.steps):
        raise ValueError(f"its models are prepared by {recipe.prepare.steps}, and the genome's are not")
    if (recipe.mixture is None) != (space.routing is None):
        raise ValueError(
            "it is a mixture of experts, and the genome's merges are not"
            if recipe.mixture
            else "it is no mixture of experts; give it a `mixture`, or genes"
        )
    if (depth := sum(of.depth for of in recipe.output_slices(space.layers))) != space.layers:
        raise ValueError(f"it has {plural(depth, 'layer')}, the models have {space.layers}")
    steps = plan(recipe, [*tensors], space.layers)
    read = {gene.name: _read(space, gene, recipe, steps) for gene in space.genes}
    # A split is looked for where the recipe has another slice.
    starts = {of.sources[0].layer_range[0] for of in recipe.slices or []} if space.genome.split else set[int]()
    inside = {*starts} - {start for start, _ in space.spans}  # where two equal models change roles, the recipe shows it
    splits = [*sorted(inside), space.layers, *sorted({*starts} - inside - {0}, reverse=True)]
    failure: ValueError | None = None
    for at in splits:
        genes = read
        if SPLIT in read:
            other = space.exchanged(read)  # slices that begin after the split were read with exchanged roles
            first = dict(zip(space.slices, (start for start, _ in space.spans), strict=True))
            later = [gene.name for gene in space.genes if gene.slice and first[gene.slice] >= at]
            genes = {**read, **{name: other[name] for name in later}, SPLIT: float(at)}
        try:
            genes = _bounded(space, genes)
            decoded = space.decode(genes)
            for step, again in zip(steps, plan(decoded, [*tensors], space.layers), strict=True):
                _compare(space, (recipe, step), (decoded, again))
        except ValueError as error:
            failure = failure or error
        else:
            return genes
    assert failure
    raise failure


def _number(value: float | str, choices: Sequence[str]) -> float:
    """A gene's number, also of a choice by its name. Raise ValueError."""
    return float(choices.index(value)) if isinstance(value, str) and value in choices else numeral(value)


def _complete(space: SearchSpace, genes: Mapping[str, float]) -> Mapping[str, float]:
    names = [gene.name for gene in space.genes]
    for name in genes:
        if name not in names:
            raise ValueError(f"there is no gene {name!r}{nearest(name, names)}")
    for name in names:
        if name not in genes:
            raise ValueError(f"the gene {name!r} is missing")
    return genes


def _bounded(space: SearchSpace, genes: Mapping[str, float]) -> Genes:
    """The genes on their grid. Raise ValueError for one outside its bounds."""
    for gene in space.genes:
        if not gene.low <= genes[gene.name] <= gene.high:
            raise ValueError(
                f"{gene.name} is {genes[gene.name]:g}, its bounds are {gene.low:g} to {gene.high:g}; genome.bounds"
                " widens them"
            )
    return space.clamp(genes)


def _read(space: SearchSpace, gene: Gene, recipe: Recipe, steps: Sequence[Step]) -> float:
    """The value in the recipe for the first tensor of a gene; the others are compared afterwards."""
    step = next((step for step in steps if _holds(space, gene, step)), None)
    start = space.uniform()[gene.name]
    if gene.name == SPLIT:
        return start
    if gene.name in (routing := space.routing_values(recipe)):
        return routing[gene.name]
    if step is None:  # a filter that no tensor matches
        return start
    if gene.choices:
        name = recipe.method_of(step.of).name
        if name not in gene.choices:
            raise ValueError(f"its merge_method is {name}{nearest(name, gene.choices)}")
        return float(gene.choices.index(name))
    if space.genome.smooth and len(space.slices) > 1:  # a knot of a gradient, which may lie between two layers
        step = replace(step, depth=space.slices.index(gene.slice or "") / (len(space.slices) - 1))
    missing = 0.0 if gene.model and gene.parameter in SHARES else start
    return _values(space, recipe, step).get((gene.model, gene.parameter), missing)


def _holds(space: SearchSpace, gene: Gene, step: Step) -> bool:
    """True if a tensor takes a parameter from this gene."""
    if step.layer is None or any(filter_ in step.name for filter_ in space.routers):
        return False
    if gene.slice is not None and not space.genome.smooth:
        first, last = space.spans[space.slices.index(gene.slice)]
        if not first <= step.layer < last:
            return False
    filters = [filter_ for filter_ in space.filters if filter_ and filter_ in step.name]
    return bool(gene.choices) or gene.filter == (filters[0] if filters else None)


def _values(space: SearchSpace, recipe: Recipe, step: Step) -> Values:
    """The parameters of one tensor; those of a pair by model too, as the genes have them."""
    each, shared = recipe.values(step.of, step.name, step.depth, step.inputs)
    method, origin = recipe.method_of(step.of), recipe.origin_of(step.of)
    named = [space.names[source.model] for source in step.of.sources]
    of = {name: place for place, name in enumerate(named) if step.of.sources[place].model != origin}
    found: Values = {(name, key): values[place] for key, values in each.items() for name, place in of.items()}
    found |= {(None, key): value for key, value in shared.items()}
    if space.genome.is_prepared(method):
        found[None, PREPARE] = recipe.prepared_share(step.of, step.name, step.depth)
    if method.pair and origin is not None:
        found |= {(name, key): value for name in of for key, value in shared.items()}
        if "t" in shared:
            found[space.names[origin], "t"] = 1 - shared["t"]
    return found


def _compare(space: SearchSpace, mine: tuple[Recipe, Step], other: tuple[Recipe, Step]) -> None:
    """Raise ValueError where the user's recipe and the decoded one differ in one tensor."""
    (recipe, step), (decoded, again) = mine, other
    methods = recipe.method_of(step.of).name, decoded.method_of(again.of).name
    if methods[0] != methods[1]:
        raise ValueError(f"its merge_method is {methods[0]}, the genome's {methods[1]}")
    if recipe.origin_of(step.of) != decoded.origin_of(again.of):
        raise ValueError(f"it starts from {recipe.origin_of(step.of)}, here from {decoded.origin_of(again.of)}")
    inputs, others = (dict(zip([s.model for s in p.of.sources], p.inputs, strict=True)) for p in (step, again))
    if moved := [model for model, name in inputs.items() if others.get(model, name) != name]:
        raise ValueError(f"{step.name} comes from another layer of {moved[0]}")
    given, meant = _values(space, recipe, step), _values(space, decoded, again)
    for (model, name), value in (given | meant).items():
        missing = 0.0 if model and name in SHARES else value  # of a model without a share nothing else matters
        one, two = given.get((model, name), missing), meant.get((model, name), missing)
        if abs(one - two) > TOLERANCE:
            whose = f"{name} of {model}" if model else name
            raise ValueError(f"{whose} is {one:g} for the tensor {step.name}; with genes it is {two:g} there")
