"""Carry out a mergekit recipe: read it, merge it, write the model in a format of choice."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llmevo.errors import SourceError, UserError
from llmevo.merging.mixture.classes import class_of
from llmevo.merging.mixture.mergekit import MixtureRecipe
from llmevo.merging.mixture.mixture import ROUTER
from llmevo.merging.plan import dead_filters
from llmevo.merging.provenance import Provenance
from llmevo.merging.recipe import Recipe

if TYPE_CHECKING:  # torch takes seconds to import
    from llmevo.export.formats import Format, Written


def merge(
    recipe: Recipe | Path | str,
    out: Path | str,
    *,
    as_: str | None = None,
    rank: str | int | None = None,
    energy: float | None = None,
    parameters: int | str | None = None,
    donor: Path | str | None = None,
    seed: int | None = None,
    root: Path | str = ".",
    warn: Callable[[str], None] = warnings.warn,
    say: Callable[[str], None] = lambda _: None,
) -> Recipe:
    """Merge a recipe, as `llmevo merge` does, and write it to `out`, a new folder, as a Hugging Face model.

    `recipe` is a file, or a `Recipe` whose relative references start at `root`. `as_` is another format: `lora`, an
    adapter of `rank`, `energy` or `parameters` (see `extract`; by default exact where the merge is a sum of adapters);
    `gguf:q8_0`, `gguf:q4_0`, `gguf:f16` or `gguf:bf16`, with the metadata of `donor`, by default of the base's own GGUF
    file; `fp8`. `seed` is that of random masks, by default as the file says, or 0. `warn` is called for filters that
    match no tensor, `say` with the numbers of tensors and the reasons where not all of them are merged. Return the
    recipe. Raises RecipeError for a recipe that cannot be carried out, SourceError for a model that cannot be read or
    would lose a tensor, UserError for a file, a folder or an option that cannot be used.

    >>> import llmevo
    >>> half = {"weight": 0.5}
    >>> models = [{"model": name, "parameters": half} for name in ("one", "two")]
    >>> recipe = llmevo.Recipe.model_validate({"merge_method": "linear", "models": models, "dtype": "float32"})
    >>> llmevo.merge(recipe, "mean").merge_method
    'linear'
    >>> llmevo.merge(recipe, "served", as_="fp8").merge_method
    'linear'
    """
    from llmevo.export.formats import Format  # torch takes seconds to import

    return merge_as(
        recipe, out, Format.of(as_, rank, energy, parameters, donor), seed=seed, root=root, warn=warn, say=say
    )[0]


def merge_as(
    recipe: Recipe | Path | str,
    out: Path | str,
    format_: "Format",
    *,
    seed: int | None = None,
    root: Path | str = ".",
    warn: Callable[[str], None] = warnings.warn,
    say: Callable[[str], None] = lambda _: None,
) -> "tuple[Recipe, Written]":
    """Do what `merge` does; return the recipe and what was written."""
    from llmevo.export.cards import merge_card
    from llmevo.export.pack import root_of
    from llmevo.merging.merger import MASKS_FILE, Merger, Seed, masks_of, read_masks
    from llmevo.merging.preparation.texts import read_texts
    from llmevo.merging.vocabulary import open_models
    from llmevo.merging.writer import check_new, merged_tokenizer

    masks: Seed = seed or 0
    found, beside, text_file, beside_file = None, dict[str, str](), "", Path()
    if not isinstance(recipe, Recipe):
        file = Path(recipe)
        try:
            text = file.read_text()
            if MixtureRecipe.holds(text):
                recipe, found = _mixture(text, file, say), Provenance(masks)
                beside["mergekit_moe_config.yml"] = text
            else:
                recipe, found = Recipe.from_yaml(text, str(file)), Provenance.of(text)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read ({error})") from error
        if found and seed is None:
            masks = read_masks(file.parent / found.masks, recipe) if found.masks else found.seed
        root = root_of(file.parent)
        if recipe.prepare and recipe.prepare.text:  # which lies beside the recipe
            text_file = recipe.prepare.text
            beside_file = file.parent / text_file
            texts = read_texts(text_file, file.parent)
            texts.check(recipe.prepare.named_tasks, text_file)
            recipe = recipe.with_text(texts.keep())
        if recipe.mixture and recipe.mixture.router:
            recipe = recipe.with_router(str((file.parent / recipe.mixture.router).absolute()))
    sources = open_models(recipe, Path(root), recipe.excludes)
    excluded = [name for of in recipe.references for name in sources.left_out(of) if name not in sources[of].derived]
    names = [*dict.fromkeys([*sources[recipe.donor].shapes, *excluded])]
    if dead := dead_filters(recipe, names, sources.depth(recipe.donor)):
        warn(f"These filters match no tensor, so their values are not used: {'; '.join(dead)}.")
    check_new(Path(out))
    merger = Merger(sources)
    counted = merger.count(recipe)
    if (prepared := merger.prepared(recipe)) and not prepared.is_done:
        from llmevo.run.calibration.layer_inputs import make_prepared

        if make_prepared(prepared, sources, merged_tokenizer(recipe, sources), say=say) and prepared.without:
            say(f"Prepared{prepared.without}.")
    merged, trims = recipe.with_router(ROUTER), found is None or found.trims
    if text_file:  # instead of the copy in the cache folder
        merged = merged.with_text(text_file)
    placed = merged.seen_from(Path(out), Path(root))
    if text_file and beside_file.is_file() and not Path(text_file).is_absolute():
        placed = placed.with_text(os.path.relpath(beside_file, out))
    if table := masks_of(recipe, sources, masks):  # which depend on the models' names, and these change with the folder
        beside[MASKS_FILE] = table
    if table or found:
        of = seed if seed is not None else found.seed if found else 0
        beside["mergekit_config.yml"] = Provenance(of, MASKS_FILE if table else None, trims).sign(placed)
    elif text_file:
        beside["mergekit_config.yml"] = placed.to_yaml()
    written = format_.write(
        recipe,
        sources,
        Path(out),
        masks,
        lambda relation, facts: {"README.md": merge_card(merged, sources, Path(root), relation, facts), **beside},
        trim=trims,
    )
    if any(counted.unmerged.values()):
        say(f"Tensors: {counted}.")
    return recipe, written


def _mixture(text: str, file: Path, say: Callable[[str], None]) -> Recipe:
    """Return the recipe of a mergekit-moe YAML, with its router in the cache folder."""
    from llmevo.export.pack import root_of
    from llmevo.merging.vocabulary import open_models
    from llmevo.run.calibration.routers import router_of

    given = MixtureRecipe.from_yaml(text, str(file))
    planned = given.recipe(ROUTER)
    sources = open_models(planned, root_of(file.parent))
    config = sources.config(given.base_model)
    assert planned.mixture
    try:
        class_of(config, planned.mixture)  # before the forward passes
    except SourceError as error:
        raise SourceError(f"{given.base_model}: {error}") from error
    router = router_of(given, sources, sources.folder(given.base_model))
    say(f"Routers: gate_mode {given.gate_mode}.")
    return given.recipe(str(router.keep()), str(config.get("dtype") or config.get("torch_dtype") or "") or None)
