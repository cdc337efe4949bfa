"""What recipes say."""

from typing import Any

from llmevo.merging.recipe import Recipe


def parameters_of(
    recipe: Recipe, tensor: str = "model.norm.weight", depth: float = 0.0, place: int = 0
) -> dict[str, Any]:
    """The parameters of one tensor of one slice of four layers, those of each model and the shared ones in one."""
    each, shared = recipe.values(recipe.output_slices(4)[place], tensor, depth)
    return {**each, **shared}
