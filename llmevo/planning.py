"""The steps of a merge: which tensors the result has, and what each is called in the models."""

import re
from collections.abc import Mapping
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
    """The number of layers, from a model's config. Raises RecipeError when it names none, and SourceError for a model
    that has an encoder and a decoder.
    """
    if config.get("is_encoder_decoder"):
        raise SourceError(
            f"config.json: {config.get('model_type')} is an encoder-decoder model (is_encoder_decoder: true); llmevo"
            " merges decoder-only language models, such as Llama, Qwen or Gemma"
        )
    for key in DEPTH_KEYS:
        if key in config:
            if not isinstance(config[key], int) or config[key] < 1:
                raise RecipeError(f"the model's config.json has {key}: {config[key]!r}, which is no number of layers")
            return config[key]
    raise RecipeError("the model's config.json names no number of layers (num_hidden_layers)")


def plan(recipe: Recipe, names: list[str], layers: int) -> list[Step]:
    """Every tensor of the result, in the order of a checkpoint: before the layers, the layers, after them.

    `names` are the donor's tensors. Raises RecipeError when a slice reaches past the `layers` there are, and
    SourceError when the donor has no weights of a layer.
    """
    slices = recipe.output_slices(layers)
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
            if starts[0] + offset not in by_layer:
                raise SourceError(
                    f"{of.sources[0].model}: its config.json says that it has {layers} layers, and it has no weights of"
                    f" layer {starts[0] + offset}; fetch both files of one model"
                )
            for before, after in by_layer[starts[0] + offset]:
                inputs = tuple(f"{before}{start + offset}{after}" for start in starts)
                steps.append(Step(f"{before}{layer}{after}", of, depth, inputs, f"{before}{base + offset}{after}"))
            layer += 1
    steps += [_outside(name, slices[-1]) for name in outside if not any(part in name for part in BEFORE_LAYERS)]
    return steps


def _outside(name: str, of: OutputSlice) -> Step:
    return Step(name, of, 0.0, (name,) * len(of.sources), name)
