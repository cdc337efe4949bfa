"""Layers of several kinds in a config: which numbers change when a result has other layers than its model.

A list with an entry for each layer follows the layers. A number that only says "every fourth layer" cannot: a path
that would give a layer another kind than it has is refused.
"""

from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from llmevo.errors import SourceError
from llmevo.models.architecture import DEPTH_KEYS, LAYER_LISTS, text_config

BASES = ("rope_theta", "rope_local_base_freq", "rotary_emb_base")
"""The keys of a config for the base of the rotary embedding; also in `rope_parameters`, or there for each kind."""

PATTERN = "hybrid_override_pattern"
"""A text with a letter for each layer."""

MORE_LISTS = (
    *("block_configs", "attn_type_list", "activation_sparsity_pattern", "moe_layer_freq", "intermediate_size"),
    *("layer_rope_theta", "attention_layers"),
)
"""Keys of a config that have an entry for each layer in some models; others have a number there, or no such key."""

NUMBERS = (
    *("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs"),
    *("hybrid_layer_ids", "cross_attention_layers"),
)
"""The keys of a config that list the numbers of the layers of one kind."""

DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "gemma2": {"sliding_window_pattern": 2},
    "gpt_oss": {"sliding_window_pattern": 2},
    "gemma3_text": {"sliding_window_pattern": 6},
    **{key: {"sliding_window_pattern": 4} for key in ("cohere2", "olmo3", "exaone4")},
    **{key: {"full_attention_interval": 4} for key in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
    **{key: {"no_rope_layer_interval": 4} for key in ("smollm3", "llama4_text")},
    "jamba": {"attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2, "expert_layer_offset": 1},
}
"""Values of keys that a config may leave out, by `model_type`."""


def scale_rope(config: MutableMapping[str, Any], factor: float) -> None:
    """Multiply the base of the rotary embedding in a language model's config, or transformers' default of its class.

    Raises SourceError where it has none.
    """
    if _scaled_bases(config, factor):
        return
    base = _default_base(config)
    if base is None:
        raise SourceError(
            f"its config has no {BASES[0]}, and its class no default of it that rope {factor:g} could change; leave"
            " rope out"
        )
    own = config.get("rope_parameters")
    if isinstance(own, MutableMapping):
        own[BASES[0]] = base * factor
    else:
        config[BASES[0]] = base * factor


def _default_base(config: Mapping[str, Any]) -> float | None:
    """Return the base that transformers takes where a config has none; None for a class without a single one."""
    from transformers import AutoConfig  # takes a second

    try:
        made: Any = AutoConfig.for_model(str(config.get("model_type")))
    except ValueError:
        return None
    found: Any = getattr(made, "rope_parameters", None)
    # The default of a class with a scaling of its own is one of the whole embedding.
    is_plain = isinstance(found, Mapping) and found.get("rope_type") == "default"
    return cast(Mapping[str, float], found).get(BASES[0]) if is_plain else None


def _scaled_bases(config: MutableMapping[str, Any], factor: float) -> int:
    found = 0
    for key, value in [*config.items()]:
        if key in BASES and isinstance(value, int | float):
            config[key] = value * factor
            found += 1
        elif key in ("rope_parameters", "full_attention", "sliding_attention") and isinstance(value, MutableMapping):
            found += _scaled_bases(cast(MutableMapping[str, Any], value), factor)
    return found


@dataclass(frozen=True)
class Rule:
    """A number of a config that determines the kinds of layers."""

    key: str
    lists: tuple[str, ...] = ()
    """Keys that take its place where they have an entry for each layer, or list layers."""
    offset: str | int = -1
    """The place in a period of its layer of another kind, or the key that says it."""
    kind: str = "period"
    """`period`; `first`, the number of first layers; `last`, the number of the last one of a kind; `order`, where
    layers depend on their number or on others."""
    only_with: str = ""
    """A key without which it has none."""


RULES = (
    Rule("full_attention_interval", ("layer_types",)),
    Rule("sliding_window_pattern", ("layer_types",)),
    Rule("_sliding_window_pattern", ("layer_types",)),
    Rule("no_rope_layer_interval", ("no_rope_layers",)),
    Rule("interleave_moe_layer_step", ("moe_layers", "mlp_layer_types")),
    Rule("attn_layer_period", offset="attn_layer_offset"),
    Rule("expert_layer_period", offset="expert_layer_offset"),
    Rule("decoder_sparse_step"),
    Rule("moe_layer_freq", offset=0),
    Rule("moe_layer_interval"),
    Rule("first_k_dense_replace", ("mlp_layer_types",), kind="first"),
    Rule("num_dense_layers", ("mlp_layer_types",), kind="first"),
    Rule("global_attn_every_n_layers", ("layer_types",), offset=0),
    Rule("moe_layer_start_index", kind="first"),
    Rule("moe_layer_end_index", kind="last"),
    Rule("max_window_layers", ("layer_types",), kind="first", only_with="use_sliding_window"),
    Rule("num_kv_shared_layers", kind="order"),
    Rule("scale_attn_by_inverse_layer_idx", kind="order"),
)


def rearranged(config: dict[str, Any], layers: int, origins: Sequence[int]) -> dict[str, Any]:
    """Return a model's config with other layers: `origins` are the model's layers that those of the result are.

    `layers` is the model's number. A multimodal model's config is nested, and older ones have the language model's keys
    at the top as well. Raises SourceError for a pattern that the config cannot say.
    """
    if [*origins] == [*range(layers)]:
        return config
    text = text_config(config)
    holders = (config,) if text is config else (config, cast(MutableMapping[str, Any], text))
    for holder in holders:
        if holder.get("moe_layer_end_index") == layers - 1:
            holder["moe_layer_end_index"] = -1  # the last layer, whichever that is
    _check(text, layers, origins)
    for holder in holders:
        for key in (*LAYER_LISTS, *MORE_LISTS, PATTERN):
            if isinstance(holder.get(key), list | str) and len(holder[key]) == layers:
                entries = [holder[key][origin] for origin in origins]
                holder[key] = "".join(entries) if isinstance(holder[key], str) else entries
        for key in NUMBERS:
            if isinstance(holder.get(key), list):
                holder[key] = [place for place, origin in enumerate(origins) if origin in holder[key]]
        if isinstance(blocks := holder.get("block_types"), list) and blocks:  # which repeats from layer to layer
            holder["block_types"] = [blocks[origin % len(blocks)] for origin in origins]
        if isinstance(counted := holder.get("attention_types"), list):  # GPT-Neo's: kinds, and how often these repeat
            kinds = [kind for of, count in counted for _ in range(count) for kind in of]
            holder["attention_types"] = [[[kinds[origin]], 1] for origin in origins]
        for key in DEPTH_KEYS:
            if key in holder:
                holder[key] = len(origins)
    if len(origins) != layers and not any(key in of for key in (*DEPTH_KEYS, *LAYER_LISTS) for of in holders):
        cast(dict[str, Any], text)[DEPTH_KEYS[0]] = len(origins)
    return config


def _check(text: Mapping[str, Any], layers: int, origins: Sequence[int]) -> None:
    given = {**DEFAULTS.get(str(text.get("model_type")), {}), **text}
    for rule in RULES:
        value = given.get(rule.key)
        if (
            not value
            or isinstance(value, list)
            or (rule.only_with and not given.get(rule.only_with))
            or any(_says(given, rule, layers))
        ):
            continue
        for place, origin in enumerate(origins):
            if _kind(rule, given, place) != _kind(rule, given, origin):
                raise SourceError(_refusal(rule, value, place, origin))


def _says(config: Mapping[str, Any], rule: Rule, layers: int) -> list[bool]:
    """Return whether each of a rule's lists is there."""
    lists = [(key, config.get(key)) for key in rule.lists]
    return [
        isinstance(of, list) and bool(of) and (key in NUMBERS or len(cast(list[Any], of)) == layers)
        for key, of in lists
    ]


def _kind(rule: Rule, config: Mapping[str, Any], layer: int) -> Hashable:
    value = config[rule.key]
    if rule.kind == "order":
        return layer
    if rule.kind == "last":
        return value < 0 or layer <= value
    if rule.kind == "first":
        return layer < value
    period = len(value) if isinstance(value, str) else int(value)
    offset = rule.offset if isinstance(rule.offset, int) else int(config.get(rule.offset, 0))
    return layer % period == offset % period


def _refusal(rule: Rule, value: object, place: int, origin: int) -> str:
    said = f"config.json: {rule.key} is {value}"
    if rule.kind == "order":
        return f"{said}: layers depend on their number, so the slices cannot change their order or leave some out"
    if rule.kind == "first":
        out = f"keep the first {value} layers first"
    elif rule.kind == "last":
        out = f"keep the layers after {value} last"
    else:
        period = len(value) if isinstance(value, str) else value
        out = f"repeat, swap and leave out whole periods of {period} layers"
    lacks = f", and it has no {' or '.join(rule.lists)} that could say so" if rule.lists else ""
    return (
        f"{said}: layer {origin} of the model would be layer {place} of the result, where the config has another kind"
        f" of layer{lacks}; {out}"
    )
