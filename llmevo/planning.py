"""The steps of a merge: which tensors the result has, and what each is called in the models."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmevo.errors import RecipeError, SourceError
from llmevo.plurals import plural
from llmevo.recipe import Recipe
from llmevo.slices import OutputSlice

LAYER = re.compile(r"^(.*?\.?(?:layers|h|blocks)\.)(\d+)(\..+)$")
"""A tensor of a layer: what stands before the layer's number, the number, and what stands after it."""

BEFORE_LAYERS = ("embed", "wte", "wpe")
"""Tensors that come before the layers: they take the first slice's parameters, all others the last one's."""

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
"""What configs call the number of layers."""

PREDICTION_KEY = "num_nextn_predict_layers"
"""What configs call the number of layers for multi-token prediction: after the others, and not used by transformers."""


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


def depth_of(config: Mapping[str, Any]) -> int:
    """The number of layers, from a model's config. Raises SourceError when it names none, and for a model that has an
    encoder and a decoder or reads more than text.
    """
    if config.get("is_encoder_decoder"):
        raise SourceError(
            f"config.json: {config.get('model_type')} is an encoder-decoder model (is_encoder_decoder: true); llmevo"
            " merges decoder-only language models, such as Llama, Qwen or Gemma"
        )
    key = next((key for key in DEPTH_KEYS if key in config), None)
    if key is None and isinstance(config.get("text_config"), Mapping):
        raise SourceError(
            "config.json is that of a multimodal model (it has a text_config); llmevo merges text models: save its"
            " language model as a model of its own"
        )
    if key is None:
        raise SourceError(f"config.json names no number of layers ({DEPTH_KEYS[0]})")
    if not isinstance(config[key], int) or isinstance(config[key], bool) or config[key] < 1:
        raise SourceError(f"config.json: {key} is {config[key]!r}; it must be the number of layers, 1 or more")
    return config[key]


def layers_in(names: Iterable[str]) -> int:
    """The number of layers that tensors of these names belong to, up to the last one."""
    return max((int(match[2]) + 1 for name in names if (match := LAYER.match(name))), default=0)


def check_layers(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise SourceError unless a model's tensors are of the layers that its config names, all of them and no others.

    Layers for multi-token prediction come after them; candidates have none of these.
    """
    depth, found = depth_of(config), {int(match[2]) for name in names if (match := LAYER.match(name))}
    last = max(found, default=-1)
    if not found:
        raise SourceError(
            "none of its weights belongs to a layer by its name (….layers.0.…, ….h.0.… or ….blocks.0.…); llmevo merges"
            " decoder-only language models"
        )
    said = f"config.json says {next(key for key in DEPTH_KEYS if key in config)}: {depth}"
    if missing := {*range(depth)} - found:
        raise SourceError(
            f"{said}, but no weight belongs to layer {min(missing)}: the checkpoint is incomplete, or its config.json"
            " is that of another model; download both again"
        )
    if last >= depth + int(config.get(PREDICTION_KEY) or 0):
        raise SourceError(
            f"{said}, but there are weights of layer {last}, which would be lost in a merge; correct config.json, or"
            " save the model again with transformers"
        )


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
