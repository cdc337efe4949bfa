"""The layers of a model: how many there are, and which tensor belongs to which."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmevo.errors import SourceError

LAYER = re.compile(r"^(.*?\.?(?:layers|h|blocks)\.)(\d+)(\..+)$")
"""A tensor of a layer: what stands before the layer's number, the number, and what stands after it."""

BEFORE_LAYERS = ("embed", "wte", "wpe")
"""Tensors that come before the layers: they take the first slice's parameters, all others the last one's."""

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
"""What configs call the number of layers."""

PREDICTION_KEY = "num_nextn_predict_layers"
"""What configs call the number of layers for multi-token prediction: after the others, and not used by transformers."""


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
