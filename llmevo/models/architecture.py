"""The architecture of models: their layers, by the names of their tensors, and whether two models can be merged."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from llmevo.errors import SourceError

LAYER = re.compile(r"^((?:[^.]+\.)*?)(\d+)(\..+)$")
"""A tensor of a numbered block, of the language model or another part: its name up to the number, the number, the
rest."""

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""The keys of a config for the number of layers."""

LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")
"""The keys of a config with an entry for each layer, in models whose layers differ. Some name no number of layers."""

TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
"""The keys under which a multimodal model's config holds that of its language model."""

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""The keys of a config for the number of a layer's experts."""

USED_KEYS = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k")
"""The keys of a config for the number of experts that a token passes through."""

TOWER_WORDS = re.compile(r"vis(?:ion|ual)|image|video|audio|speech|talker")
"""Words in the names of vision, audio and speech towers."""

EMBEDDINGS = re.compile(r"(?<![^.])(?:embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|embeddings?)\.weight$")
"""The embeddings of tokens, which stand next to the language model's layers."""

POSITIONS = re.compile(r"(?<![^.])(?:wpe|embed_positions)\.weight$")
"""The learnt embeddings of positions."""

HEADS = re.compile(r"(?<![^.])(?:lm_head|embed_out)\.(?:weight|bias)$|^(?:\D+\.)?output\.(?:weight|bias)$")
"""Output heads, with a bias in some models. In layers `output` is another matrix, as in RWKV's attention."""

PREDICTION = re.compile(r"(?:^|\.)mtp[^.]*\.")
"""Modules for multi-token prediction that are not among the layers."""

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The three matrices of a gated MLP, by the last module of their names."""


@dataclass(frozen=True)
class ExpertLayout:
    """Where a class of mixtures has its experts, and what dense models these are with the rest of the model."""

    dense: Mapping[str, str]
    """{`model_type` of a dense class: its architecture}, the usual one first."""
    module: str
    """The module of a layer that holds router and experts."""
    matrices: tuple[str, str, str]
    """The names of an expert's gate, up and down projection."""


EXPERT_LAYOUTS: Mapping[str, ExpertLayout] = {
    "mixtral": ExpertLayout(
        {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}, "block_sparse_moe", ("w1", "w3", "w2")
    ),
    "qwen3_moe": ExpertLayout({"qwen3": "Qwen3ForCausalLM"}, "mlp", PROJECTIONS),
    "qwen2_moe": ExpertLayout({"qwen2": "Qwen2ForCausalLM"}, "mlp", PROJECTIONS),
}
"""By the `model_type` of the mixture."""

QUANTIZED_NAMES = (".SCB", ".qweight", ".qzeros", ".scales", ".g_idx", ".absmax", ".weight_scale", ".weight_scale_inv")
"""Ends of the names of tensors that only quantized checkpoints have."""

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
"""Keys of a config that determine the shapes of tensors."""

OPTIONAL_TENSORS = (
    *("attention_bias", "mlp_bias", "qkv_bias", "use_qk_norm"),
    *("num_experts", "num_local_experts", "n_routed_experts"),
)
"""Keys of a config that determine which tensors a model has."""

HEAD = "lm_head.weight"
Shapes = Mapping[str, tuple[int, ...]]
Configs = tuple[Mapping[str, Any], Mapping[str, Any]]


TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

NEUTRAL = {
    *TOKEN_IDS,
    *("_name_or_path", "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "initializer_range"),
    *("id2label", "label2id", "max_position_embeddings", "torch_dtype", "transformers_version", "use_cache"),
}
"""Keys of a config.json that change nothing of what the weights compute."""


def computing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that may change what the weights compute. Dropout acts in training only."""
    kept = {key: value for key, value in config.items() if key not in NEUTRAL and "dropout" not in str(key)}
    return {key: computing(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the language model: the model's own, or the nested one of a multimodal model."""
    nested = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), Mapping)), None)
    return config if nested is None else text_config(nested)


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Return whether a model reads images, sound or video besides text."""
    return text_config(config) is not config or any(
        TOWER_WORDS.match(key) and key.endswith("_config") for key in config
    )


def _depth_key(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], str]:
    """Return the key that names the number of layers, the config that has it, and how to call it.

    Raises SourceError where none has. Older multimodal models have the language model's keys at the top.
    """
    nested = text_config(config)
    for holder, place in ((nested, "" if nested is config else "text_config."), (config, "")):
        if key := next((key for key in (*DEPTH_KEYS, *LAYER_LISTS) if key in holder), None):
            return key, holder, place + key
    raise SourceError(f"config.json names no number of layers ({DEPTH_KEYS[0]})")


def depth_of(config: Mapping[str, Any]) -> int:
    """Return the number of layers that a model's config names; of a multimodal model that of its language model.

    Raises SourceError for a config without it, and for a model that has an encoder and a decoder.
    """
    if config.get("is_encoder_decoder"):
        raise SourceError(
            f"config.json: {config.get('model_type')} is an encoder-decoder model (is_encoder_decoder: true); llmevo"
            " merges decoder-only language models, such as Llama, Qwen or Gemma"
        )
    key, holder, called = _depth_key(config)
    depth = len(cast(list[Any], holder[key])) if isinstance(holder[key], list) else holder[key]
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
        raise SourceError(f"config.json: {called} is {holder[key]!r}; it must be the number of layers, 1 or more")
    return depth


@dataclass(frozen=True)
class TextStack:
    """The layers of a language model. Vision and audio towers have layers with a numbering of their own."""

    start: str
    """Their names up to the number, such as `model.layers.` or `model.language_model.layers.`."""
    depth: int
    """How many there are. Layers for multi-token prediction may follow these; they count as outside."""

    @property
    def parent(self) -> str:
        """The module of the layers, with the embeddings and the last norm: `model.`, or empty."""
        return self.start[: self.start.rstrip(".").rfind(".") + 1]

    def numbered(self, name: str) -> tuple[int, str] | None:
        """Return the number after `start` in a tensor's name and the rest; None for other tensors."""
        number, dot, rest = name.removeprefix(self.start).partition(".")
        return (int(number), rest) if name.startswith(self.start) and dot and number.isdigit() else None

    def layer(self, name: str) -> int | None:
        """Return the layer that a tensor belongs to; None outside the layers."""
        found = self.numbered(name)
        return found[0] if found and found[0] < self.depth else None

    def predicts(self, name: str) -> bool:
        """Return whether a tensor is of multi-token prediction: of a layer after the last, or of a module `mtp`."""
        return bool(PREDICTION.search(name)) or (self.numbered(name) is not None and self.layer(name) is None)


def text_stack(names: Iterable[str], depth: int) -> TextStack:
    """Return the layers of the language model among all tensors of a model.

    Of all numbered blocks they are those next to the embeddings of tokens, not of a vision or audio tower by their
    names, and as many as `depth`; in this order. Raises SourceError where nothing is numbered.
    """
    numbers: dict[str, set[int]] = {}
    sizes: Counter[str] = Counter()
    beside: set[str] = set()
    for name in names:
        if match := LAYER.match(name):
            numbers.setdefault(match[1], set()).add(int(match[2]))
            sizes[match[1]] += 1
        elif match := EMBEDDINGS.search(name):
            beside.add(name[: match.start()])
    if not numbers:
        raise SourceError(
            "none of its weights belongs to a layer by its name (….layers.0.…, ….h.0.… or ….blocks.0.…); llmevo merges"
            " decoder-only language models"
        )

    def fitness(start: str) -> tuple[bool | int, ...]:
        found = numbers[start]
        is_own = not TOWER_WORDS.search(start) and not PREDICTION.search(start)
        is_beside = TextStack(start, depth).parent in beside
        return is_beside, is_own, found == {*range(depth)}, found >= {*range(depth)}, sizes[start]

    return TextStack(max(numbers, key=fitness), depth)


def stack_of(config: Mapping[str, Any], names: Iterable[str]) -> TextStack:
    """Return the layers of a model by its config and the names of its tensors.

    The nested config of a multimodal model may leave their number to its default; then the names give it. Raises
    SourceError where nothing is numbered.
    """
    names = [*names]
    try:
        return text_stack(names, depth_of(config))
    except SourceError:
        start = text_stack(names, 1).start
    return TextStack(start, len({of[0] for name in names if (of := TextStack(start, 1).numbered(name))}))


def check_layers(config: Mapping[str, Any], names: Iterable[str]) -> int:
    """Return the number of layers. Raises SourceError unless the language model's tensors belong to exactly the layers
    of the config; those for multi-token prediction (`num_nextn_predict_layers`) may follow.
    """
    names, text = [*names], text_config(config)
    if text is config or any(key in each for key in (*DEPTH_KEYS, *LAYER_LISTS) for each in (text, config)):
        depth_of(config)  # raises what is wrong with it
        called = _depth_key(config)[2]
    else:
        called = "text_config"
    stack = stack_of(config, names)
    depth, found = stack.depth, {of[0] for name in names if (of := stack.numbered(name))}
    said = f"config.json says {called}: {depth}"
    if missing := {*range(depth)} - found:
        raise SourceError(
            f"{said}, but no weight belongs to layer {min(missing)}: the checkpoint is incomplete, or its config.json"
            " is that of another model; download both again"
        )
    if max(found) >= depth + int(text.get("num_nextn_predict_layers") or 0):
        raise SourceError(
            f"{said}, but there are weights of layer {max(found)}, which would be lost in a merge; correct config.json,"
            " or save the model again with transformers"
        )
    return depth


def experts_of(config: Mapping[str, Any]) -> int:
    """Return how many experts a layer of a mixture of experts has, by its config; 0 for a dense model."""
    text = text_config(config)
    counts = [text[key] for key in EXPERT_KEYS if isinstance(text.get(key), int) and text[key] > 1]
    return int(counts[0]) if counts else 0


def active_parameters(config: Mapping[str, Any], shapes: Shapes) -> tuple[list[int], int]:
    """Return how many parameters a token is multiplied by: in each layer, and in the output head.

    Of experts those count that a token passes through, or all where the config does not say how many. Embeddings are
    looked up, and count only as a head.
    """
    text, stack, experts = text_config(config), stack_of(config, shapes), experts_of(config)
    used = next((text[key] for key in USED_KEYS if isinstance(text.get(key), int)), experts)
    counted = [0.0] * stack.depth
    for name, shape in shapes.items():
        if (layer := stack.layer(name)) is not None:
            is_expert = experts and (re.search(r"\.experts\.\d+\.", name) or is_stack_of_experts(name, shape, experts))
            counted[layer] += math.prod(shape) * (min(used / experts, 1.0) if is_expert else 1.0)
    sizes = [text.get(key) for key in ("vocab_size", "hidden_size")]
    return [round(of) for of in counted], math.prod(size for size in sizes if isinstance(size, int)) if all(
        sizes
    ) else 0


def is_stack_of_experts(name: str, shape: Sequence[int], experts: int) -> bool:
    """Return whether one tensor holds a matrix, or a vector, of every expert: its first dimension is the expert."""
    if not experts or not shape or shape[0] != experts:
        return False
    # A short convolution is (channels, 1, width).
    return (len(shape) == 3 and shape[1] > 1) or (len(shape) == 2 and ".experts." in name)


def routers_of(shapes: Shapes, config: Mapping[str, Any]) -> list[str]:
    """Return filters that hold for the routers of a mixture of experts and for nothing else, such as `mlp.gate.`.

    A router stands next to the experts of its layer and has one row for each. Empty for a dense model.
    """
    experts = experts_of(config)
    if not experts:
        return []
    stack = stack_of(config, shapes)
    within: list[tuple[str, str, tuple[int, ...]]] = []  # layer, name in the layer, shape
    places: set[tuple[str, str]] = set()  # layer, module in the layer that holds the experts
    for name, shape in shapes.items():
        found = stack.numbered(name)
        if found is None or stack.layer(name) is None:
            continue
        layer, rest = str(found[0]), f".{found[1]}"
        within.append((layer, rest, shape))
        if ".experts." in rest:
            places.add((layer, rest[: rest.index(".experts.") + 1]))
        elif is_stack_of_experts(rest, shape, experts):
            places.add((layer, rest.removesuffix(".weight").rpartition(".")[0] + "."))
    filters: dict[str, None] = {}
    for layer, rest, shape in within:
        if len(shape) != 2 or shape[0] != experts or ".experts." in rest:
            continue
        for place in (place for other, place in places if other == layer and rest.startswith(place)):
            module = rest.removeprefix(place).partition(".")[0]
            filters[f"{place}{module}.".lstrip(".")] = None
    return [*filters]


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
    here, there = _layers_in(first), _layers_in(second)
    if here == there:
        return ""
    return (
        f"{one} has {here} layers, {other} {there} (num_hidden_layers): only models of one depth can be merged; leave"
        " out the model that was not tuned from the same base"
    )


def _layers_in(names: Shapes) -> int:
    """Return the number of layers by the names of the tensors alone; 0 where none is numbered."""
    try:
        stack = text_stack(names, 1)
    except SourceError:
        return 0
    return max(of[0] for name in names if (of := stack.numbered(name))) + 1


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
    different = {*first} ^ {*second}
    if not all(name.endswith(HEAD) for name in different):
        return ""
    if different & first.keys():
        return (
            f"{one} has an output head of its own ({HEAD}) and {other} has neither one nor tie_word_embeddings: true:"
            f" its checkpoint is incomplete, download it again"
        )
    return (
        f"{other} has an output head of its own ({HEAD}) that is no copy of its embeddings; {one}, whose tensors the"
        f" result has, uses its embeddings as the head (tie_word_embeddings), so that head would be lost. Give {one} a"
        " head: load it with transformers, copy its embeddings to its lm_head, set tie_word_embeddings: false and save"
        f" it; or make {other} the base_model"
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
    values = _other_values(OPTIONAL_TENSORS, one, other, configs)
    rule = "" if incomplete else ". A tensor is merged only if all models have it: leave out the model that differs"
    return f"{'; '.join(said)}{values}{rule}"


def _other_values(keys: Sequence[str], one: str, other: str, configs: Configs) -> str:
    """Return the keys of the configs that differ, with both values, in brackets."""
    here, there = configs
    differing = [key for key in keys if here and there and here.get(key) != there.get(key)]
    values = ", ".join(f"{key}: {here.get(key)} in {one}, {there.get(key)} in {other}" for key in differing)
    return f" ({values})" if values else ""
