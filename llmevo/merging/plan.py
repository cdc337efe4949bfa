"""The plan of a merge: every tensor of the result, and what it is made of."""

from collections.abc import Iterable
from dataclasses import dataclass

from llmevo.errors import RecipeError, plural
from llmevo.merging.recipe import Conditional, OutputSlice, Recipe, Settings
from llmevo.models.architecture import HEADS, TOWER_WORDS, TextStack, text_stack

BEFORE_LAYERS = ("embed", "wte", "wpe")
"""Parts of the names of tensors before the layers (embeddings of tokens and positions, their norms), which take the
first slice's parameters. All others outside the layers take the last one's, output heads (`embed_out`) among them."""


@dataclass(frozen=True)
class Step:
    """One tensor of the result: its name, and its name in each source of its slice."""

    name: str
    of: OutputSlice
    depth: float
    """Its place in the slice, 0 to 1, for gradients."""
    inputs: tuple[str, ...]
    base: str
    """Its name in the base model."""
    layer: int | None = None
    """The layer of the result that it belongs to; None outside the language model's layers."""


def is_before_layers(name: str, stack: TextStack) -> bool:
    """Return whether a tensor comes before the language model's layers; those of towers do not."""
    own = name.startswith(stack.parent) and not TOWER_WORDS.search(name)
    return own and any(part in name for part in BEFORE_LAYERS) and not HEADS.search(name)


def plan(recipe: Recipe, names: list[str], layers: int) -> list[Step]:
    """Return every tensor of the result, in the order of a checkpoint: before the layers, the layers, after them.

    Layers are those of the language model; tensors of towers and of multi-token prediction are outside of them.
    `names` are the donor's tensors. Raises RecipeError for a slice outside the donor's `layers`.
    """
    slices, known = recipe.output_slices(layers), {*names}
    stack = text_stack(names, layers)
    before: list[Step] = []
    after: list[Step] = []
    by_layer: dict[int, list[str]] = {}
    for name in names:
        number = stack.numbered(name)
        if number and number[0] < layers:
            by_layer.setdefault(number[0], []).append(number[1])
        elif number:  # multi-token prediction: its layers follow the last one of the result
            place = number[0] - layers + sum(of.depth for of in slices)
            after.append(_outside(name, slices[-1], f"{stack.start}{place}.{number[1]}"))
        elif is_before_layers(name, stack):
            before.append(_outside(name, slices[0], name))
        else:
            after.append(_outside(name, slices[-1], name))
    steps = before
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
            base_model = of.base_model or recipe.base_model
            base_start = next((s.layer_range[0] for s in of.sources if s.model == base_model), starts[0])
            kinds = {start: by_layer.get(start + offset, []) for start in starts}
            for rest in dict.fromkeys(rest for kind in kinds.values() for rest in kind):
                inputs = tuple(f"{stack.start}{start + offset}.{rest}" for start in starts)
                if lacking := [name for name in inputs if name not in known]:
                    one = next(name for name in inputs if name in known)
                    raise RecipeError(
                        f"layer_range: {one} cannot be merged with {lacking[0]}, which the models do not have; only"
                        " layers of one kind can be merged"
                    )
                called, in_base = (f"{stack.start}{number}.{rest}" for number in (layer, base_start + offset))
                steps.append(Step(called, of, depth, inputs, in_base, layer))
            layer += 1
    return steps + after


def _outside(name: str, of: OutputSlice, called: str) -> Step:
    return Step(called, of, 0.0, (name,) * len(of.sources), name)


def dead_filters(recipe: Recipe, names: list[str], layers: int) -> list[str]:
    """Return the filters of parameters that match no tensor, with the parameter; mergekit ignores such settings.

    `names` are the donor's tensors. Raises what `plan` raises.
    """
    steps = plan(recipe, names, layers)
    scopes: list[tuple[Settings | None, Iterable[str]]] = [(recipe.parameters, [step.name for step in steps])]
    for of in {id(step.of): step.of for step in steps}.values():
        mine = [step for step in steps if step.of is of]
        scopes.append((of.parameters, [step.name for step in mine]))
        scopes += [(source.parameters, [step.inputs[i] for step in mine]) for i, source in enumerate(of.sources)]
    is_used: dict[str, bool] = {}  # a filter may match in one slice and not in another
    for settings, tensors in scopes:
        for name, setting in (settings or {}).items():
            for part in setting if isinstance(setting, list) else [setting]:
                if isinstance(part, Conditional):
                    key = f"{name}: filter {part.filter!r}"
                    is_used[key] = is_used.get(key, False) or any(map(part.holds, tensors))
    return [key for key, used in is_used.items() if not used]
