"""The seeds of random masks, in a file beside a recipe whose models may get other names."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmevo.errors import UserError
from llmevo.merging.merger import Seed, seed_of
from llmevo.merging.plan import plan
from llmevo.merging.recipe import Recipe
from llmevo.models.checkpoints import Sources
from llmevo.models.references import ModelReference

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
"""Methods with random masks: theirs follow from the models' references as well, which may change in others' hands."""

MASKS = "masks.json"


def masks_of(recipe: Recipe, sources: Sources, seed: Seed) -> str | None:
    """The seed of every random mask, tensor by tensor, models in the order of the recipe; None where it has none."""
    methods = {recipe.merge_method, *(of.merge_method for of in recipe.slices or [])}
    if not methods & {*RANDOM}:
        return None
    steps = plan(recipe, [*sources[recipe.donor].shapes], sources.depth(recipe.donor))
    models = recipe.references
    return json.dumps({step.name: [seed_of(seed, step.name, model) for model in models] for step in steps}) + "\n"


def read_masks(file: Path, recipe: Recipe) -> Seed:
    """The seeds in such a file, for a recipe whose models may be called otherwise now. Raises UserError."""
    try:
        table: Mapping[str, Sequence[int]] = json.loads(file.read_text())
        places = {model: place for place, model in enumerate(recipe.references)}
        if any(len(seeds) != len(places) for seeds in table.values()):
            raise UserError(
                f"{file}: is of a recipe with another number of models; leave out the line `# llmevo:` above"
            )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); it belongs to the recipe, fetch it again") from error

    def seed(tensor: str, model: ModelReference) -> int:
        if tensor not in table:
            raise UserError(f"{file}: has no seed for {tensor}; these are other models than the recipe was found for")
        return table[tensor][places[model]]

    return seed
