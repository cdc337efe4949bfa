"""The architecture of models: their layers, by the names of their tensors, and whether two models can be merged."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llmevo.errors import SourceError

LAYER = re.compile(r"^(.*?\.?(?:layers|h|blocks)\.)(\d+)(\..+)$")
"""A tensor of a layer: the part of its name before the layer's number, the number, and the part after it."""

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
"""The keys of a config for the number of layers."""

QUANTIZED_NAMES = (".SCB", ".qweight", ".qzeros", ".scales", ".g_idx", ".absmax", ".weight_scale", ".weight_scale_inv")
"""Ends of the names of tensors that only quantized checkpoints have."""

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
"""Keys of a config that determine the shapes of tensors."""

PARTS = (
    *("attention_bias", "mlp_bias", "qkv_bias", "use_qk_norm"),
    *("num_experts", "num_local_experts", "n_routed_experts"),
)
"""Keys of a config that determine which tensors a model has."""

HEAD = "lm_head.weight"
Shapes = Mapping[str, tuple[int, ...]]
Configs = tuple[Mapping[str, Any], Mapping[str, Any]]


def depth_of(config: Mapping[str, Any]) -> int:
    """Return the number of layers that a model's config names.

    Raises SourceError for a config without it, and for a model that has an encoder and a decoder or is multimodal.
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


def _layers_in(names: Iterable[str]) -> set[int]:
    """Return the numbers of the layers that tensors of these names belong to."""
    return {int(match[2]) for name in names if (match := LAYER.match(name))}


def check_layers(config: Mapping[str, Any], names: Iterable[str]) -> int:
    """Return the number of layers. Raises SourceError unless the tensors belong to exactly the layers of the config.

    Layers for multi-token prediction (`num_nextn_predict_layers`) follow these; transformers does not use them, and no
    merge has them.
    """
    depth, found = depth_of(config), _layers_in(names)
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
    if max(found) >= depth + int(config.get("num_nextn_predict_layers") or 0):
        raise SourceError(
            f"{said}, but there are weights of layer {max(found)}, which would be lost in a merge; correct config.json,"
            " or save the model again with transformers"
        )
    return depth


def check_compatible(one: str, first: Shapes, other: str, second: Shapes, configs: Configs = ({}, {})) -> None:
    """Raise SourceError, with the difference, unless two models have the same tensors in the same shapes.

    `configs` are the two models' config.json, which explain the difference in the user's terms.
    """
    if first != second:
        raise SourceError(
            _other_architecture(one, first, other, second, configs)
            or _other_depth(one, first, other, second)
            or _other_shapes(one, first, other, second, configs)
            or _other_head(one, first, other, second)
            or _other_names(one, first, other, second, configs)
        )


def _other_architecture(one: str, first: Shapes, other: str, second: Shapes, configs: Configs) -> str:
    kinds = [config.get("model_type") for config in configs]
    if None not in kinds and kinds[0] != kinds[1]:
        said = f"model_type is {kinds[0]!r} in {one}, {kinds[1]!r} in {other}"
    elif not first.keys() & second.keys() and first and second:
        said = f"no tensor of the one is in the other ({next(iter(first))} in {one}, {next(iter(second))} in {other})"
        for name, shapes, longer in ((one, second, first), (other, first, second)):
            start = next((n.removesuffix(s) for n in longer for s in shapes if n.endswith(f".{s}")), "")
            if start and {n.removeprefix(start) for n in longer} == {*shapes}:
                return (
                    f"{name}: the name of every tensor begins with {start!r}, as a wrapper has saved it; save the"
                    " model itself (after PEFT's merge_and_unload, if it was trained with PEFT)"
                )
    else:
        return ""
    return f"{one} and {other} are of different architectures: {said}; only models of one architecture can be merged"


def _other_depth(one: str, first: Shapes, other: str, second: Shapes) -> str:
    here, there = (max(_layers_in(names), default=-1) + 1 for names in (first, second))
    if here == there:
        return ""
    return (
        f"{one} has {here} layers, {other} {there} (num_hidden_layers): only models of one depth can be merged; leave"
        " out the model that was not tuned from the same base"
    )


def _other_shapes(one: str, first: Shapes, other: str, second: Shapes, configs: Configs) -> str:
    name = next((name for name in first if name in second and first[name] != second[name]), None)
    if name is None:
        return ""
    shapes = f"{name} is {first[name]} in {one}, {second[name]} in {other}"
    values = _other_values(SIZES, one, other, configs)
    if ("embed" in name or "lm_head" in name) and first[name][1:] == second[name][1:]:
        return (
            f"{one} and {other} have different vocabularies: {shapes}{values}; give `tokenizer_source: union`"
            " (in a config genome.tokenizer_source), which merges embeddings by token"
        )
    return f"{one} and {other} have different shapes: {shapes}{values}; only models of one size can be merged"


def _other_head(one: str, first: Shapes, other: str, second: Shapes) -> str:
    if {*first} ^ {*second} != {HEAD}:
        return ""
    have, lack = (one, other) if HEAD in first else (other, one)
    return (
        f"{have} has an output head of its own ({HEAD}), {lack} uses its embeddings as the head (tie_word_embeddings):"
        f" {lack} has no {HEAD} to merge. Give {lack} a head: load it with transformers, copy its embeddings to its"
        f" lm_head, set tie_word_embeddings: false and save it; or, if {HEAD} of {have} is a copy of its embeddings,"
        f" set tie_word_embeddings: true for {have} and save it again"
    )


def _other_names(one: str, first: Shapes, other: str, second: Shapes, configs: Configs) -> str:
    """Return which tensors only one of the models has, and which of the two is probably at fault."""
    extra, missing = [n for n in first if n not in second], [n for n in second if n not in first]
    for model, names in ((one, extra), (other, missing)):
        if odd := next((name for name in names if name.endswith(QUANTIZED_NAMES)), None):
            return f"{model} is quantized (it has the tensor {odd}); name the model in bfloat16, float16 or float32"
        if odd := next((name for name in names if ".lora_" in name), None):
            return f"{model} has a LoRA adapter in its weights ({odd}); save it after PEFT's merge_and_unload"
    said: list[str] = []
    incomplete = False
    for have, lack, names, rest in ((one, other, extra, second), (other, one, missing, first)):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            said.append(f"{have} has the tensor {names[0]}{others}, {lack} does not")
            if (layer := LAYER.match(names[0])) and any(re.search(rf"\.\d+{re.escape(layer[3])}$", n) for n in rest):
                incomplete = True
                said.append(
                    f"{lack} has it in other layers, so its checkpoint is probably incomplete: download it again"
                )
    values = _other_values(PARTS, one, other, configs)
    rule = "" if incomplete else ". A tensor is merged only if all models have it: leave out the model that differs"
    return f"{'; '.join(said)}{values}{rule}"


def _other_values(keys: Sequence[str], one: str, other: str, configs: Configs) -> str:
    """Return the keys of the configs that differ, with both values, in brackets."""
    here, there = configs
    differing = [key for key in keys if here and there and here.get(key) != there.get(key)]
    values = ", ".join(f"{key}: {here.get(key)} in {one}, {there.get(key)} in {other}" for key in differing)
    return f" ({values})" if values else ""
