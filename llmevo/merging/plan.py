"""The steps of a merge: which tensors the result has, and what each is called in the models."""

from dataclasses import dataclass

from llmevo.errors import RecipeError, plural
from llmevo.merging.recipe import Recipe
from llmevo.merging.slices import OutputSlice
from llmevo.models.layers import BEFORE_LAYERS, LAYER


@dataclass(frozen=True)
class Step:
    """One tensor of the result: its name, and what it is called in each source of its slice."""

    name: str
    of: OutputSlice
    depth: float
    """Where in the slice it lies, 0 to 1, for gradients."""
    inputs: tuple[str, ...]
    base: str
    """What it is called in the base model."""

    @property
    def layer(self) -> bool:
        """Whether it belongs to a layer."""
        return LAYER.match(self.name) is not None


def plan(recipe: Recipe, names: list[str], layers: int) -> list[Step]:
    """Every tensor of the result, in the order of a checkpoint: before the layers, the layers, after them.

    `names` are the donor's tensors. Raises RecipeError when a slice reaches past the `layers` there are.
    """
    slices, known = recipe.output_slices(layers), {*names}
    outside = [name for name in names if not LAYER.match(name)]
    steps = [_outside(name, slices[0]) for name in outside if any(part in name for part in BEFORE_LAYERS)]
    by_layer: dict[int, list[tuple[str, str]]] = {}
    for name in names:
        if match := LAYER.match(name):
            by_layer.setdefault(int(match[2]), []).append((match[1], match[3]))
    layer = 0
    for of in slices:
        for source in of.sources:
            if source.layer_range[0] < 0 or source.layer_range[1] > layers:
                raise RecipeError(
                    f"layer_range {[*source.layer_range]} of {source.model} is outside its {plural(layers, 'layer')}"
                )
        for offset in range(of.depth):
            depth = offset / (of.depth - 1) if of.depth > 1 else 1.0
            starts = [source.layer_range[0] for source in of.sources]
            origin = of.base_model or recipe.base_model
            base = next((s.layer_range[0] for s in of.sources if s.model == origin), starts[0])
            for before, after in by_layer[starts[0] + offset]:
                inputs = tuple(f"{before}{start + offset}{after}" for start in starts)
                if lacking := [name for name in inputs if name not in known]:
                    raise RecipeError(
                        f"layer_range: {inputs[0]} cannot be merged with {lacking[0]}, which the models do not have;"
                        " only layers of one kind can be merged"
                    )
                steps.append(Step(f"{before}{layer}{after}", of, depth, inputs, f"{before}{base + offset}{after}"))
            layer += 1
    steps += [_outside(name, slices[-1]) for name in outside if not any(part in name for part in BEFORE_LAYERS)]
    return steps


def _outside(name: str, of: OutputSlice) -> Step:
    return Step(name, of, 0.0, (name,) * len(of.sources), name)
