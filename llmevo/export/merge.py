"""Carry out a mergekit recipe: read it, merge it, write the model."""

from pathlib import Path

from llmevo.errors import UserError
from llmevo.merging.provenance import Provenance
from llmevo.merging.recipe import Recipe


def merge(recipe: Recipe | Path | str, out: Path | str, *, seed: int | None = None, root: Path | str = ".") -> Recipe:
    """Merge a recipe, as `llmevo merge` does, and write it to `out`, a new folder, as a Hugging Face model.

    `recipe` is a file, or a `Recipe` whose relative references start at `root`. `seed` is that of random masks, by
    default as the file says, or 0. Return the recipe. Raises RecipeError for a recipe that cannot be carried out,
    SourceError for a model that cannot be read, UserError for a file or folder that cannot be used.

    >>> import llmevo
    >>> half = {"weight": 0.5}
    >>> models = [{"model": name, "parameters": half} for name in ("one", "two")]
    >>> recipe = llmevo.Recipe.model_validate({"merge_method": "linear", "models": models, "dtype": "float32"})
    >>> llmevo.merge(recipe, "mean").merge_method
    'linear'
    """
    from llmevo.export.pack import root_of
    from llmevo.merging.masks import read_masks  # torch takes seconds to import
    from llmevo.merging.merger import Seed
    from llmevo.merging.writer import write_model
    from llmevo.models.checkpoints import Sources

    masks: Seed = seed or 0
    found = None
    if not isinstance(recipe, Recipe):
        file = Path(recipe)
        try:
            text = file.read_text()
            recipe, found = Recipe.from_yaml(text, str(file)), Provenance.of(text)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read ({error})") from error
        if found and seed is None:
            masks = read_masks(file.parent / found.masks, recipe) if found.masks else found.seed
        root = root_of(file.parent)
    write_model(recipe, Sources.open(recipe.references, Path(root)), Path(out), masks, trim=found is None)
    return recipe
