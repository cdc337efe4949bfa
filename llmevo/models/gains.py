"""Gains of a layer's branches, folded into its weights.

A layer adds two branches to the residual stream: attention (or what stands in its place: a linear attention, a state
space, a convolution) and the MLP (or the experts). A gain multiplies what one of them adds; a temperature multiplies
the attention's scores q·k, before a soft cap, a bias or a mask. Each is exact in an ordinary checkpoint: a few weights
of the layer are multiplied, and no code of the model changes.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from llmevo.errors import SourceError
from llmevo.models.architecture import Shapes, stack_of, text_config

if TYPE_CHECKING:  # recipes are read without torch, which takes seconds to import
    from torch import Tensor

KNOWN = (
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo"),
    *("olmo2", "olmo3", "smollm3", "granite", "cohere", "cohere2", "stablelm", "starcoder2", "gpt2", "gpt_neox"),
    *("gptj", "falcon", "glm4", "nemotron", "exaone4", "ernie4_5", "hunyuan_v1_dense", "seed_oss", "opt", "bloom"),
    *("mpt", "qwen3_next", "qwen3_5_text", "granitemoehybrid", "falcon_h1", "jamba", "bamba", "mamba", "mamba2"),
    *("lfm2", "nemotron_h", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v2", "deepseek_v3"),
    *("glm4_moe", "granitemoe", "phimoe", "ernie4_5_moe", "minimax_m2", "llama4_text"),
    *("qwen2_vl", "qwen2_5_vl", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"),
)
"""The values of `model_type` whose layers are known: names do not show a norm without weights, nor a norm of 1 + w."""

ONE_MORE = ("gemma2", "gemma3_text", "qwen3_next", "qwen3_5_text")
"""Models whose norms multiply by 1 + w."""

_MIXER = r"(?:self_attn|self_attention|attention|attn|linear_attn|mamba|conv|mixer)"
_MLP = r"(?:mlp|feed_forward|ffn|block_sparse_moe|shared_mlp|mixer)"
ATTENTION_OUT = re.compile(rf"^{_MIXER}\.(?:o_proj|out_proj|dense|c_proj)\.(?:weight|bias)$")
"""The last linear map of attention, by its name in the layer."""
MLP_OUT = re.compile(
    rf"^(?:{_MLP}\.)?(?:experts\.(?:\d+\.)?|shared_experts?\.)?"
    r"(?:down_proj|fc2|fc_out|c_proj|dense_4h_to_h|w2|output_linear)(?:\.weight|\.bias|_bias)?$"
)
"""The last linear map of an MLP, of every expert and of the shared ones."""
QUERY = re.compile(rf"^{_MIXER}\.(?:q_proj|q_b_proj)\.(?:weight|bias)$")
QUERY_NORM = re.compile(rf"^{_MIXER}\.(?:q_norm|q_layernorm|query_layernorm)\.(?:norms\.\d+\.)?(?:weight|bias)$")
FUSED_QUERY = re.compile(rf"^{_MIXER}\.(?:qkv_proj|c_attn|query_key_value|Wqkv)\.(?:weight|bias)$")
NORM_AFTER = (
    ("post_self_attn_layernorm.", "post_mlp_layernorm."),
    ("post_attention_layernorm.", "post_feedforward_layernorm."),
)
"""Norms behind attention and the MLP, in models that have the second one of a pair."""


class Gains(BaseModel):
    """Factors of a layer's branches; 1 changes nothing. An attention and an MLP of 0 make the layer the identity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    attention: float = Field(default=1.0, ge=0.0)
    """Of what attention, or a state space in its place, adds to the residual stream."""
    mlp: float = Field(default=1.0, ge=0.0)
    """Of what the MLP, or the experts, add."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Of the attention's scores q·k."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: object) -> object:
        return str(value) if isinstance(value, bool) else value  # which is no number


SKIPPED = Gains(attention=0.0, mlp=0.0)
"""The gains of a layer that passes the residual stream on, bit for bit."""


@dataclass(frozen=True)
class Part:
    """The rows of the query in a fused weight: the first `query` of every `size` along an axis."""

    axis: int
    size: int
    query: int


@dataclass(frozen=True)
class Fold:
    """A factor of a weight, or of a part of it."""

    factor: float
    one_more: bool = False
    """Whether the layer multiplies by 1 + w: w' = c(1 + w) - 1."""
    part: Part | None = None

    def apply(self, weight: "Tensor") -> "Tensor":
        """Return the folded weight, float32, a new tensor."""
        folded = weight.float()
        folded = folded.clone() if folded is weight else folded  # it may be a view of a file
        if self.one_more:
            return folded.add_(1.0).mul_(self.factor).sub_(1.0)
        if self.part is None:
            return folded.mul_(self.factor)
        axis = self.part.axis % folded.ndim
        folded.unflatten(axis, (-1, self.part.size)).narrow(axis + 1, 0, self.part.query).mul_(self.factor)
        return folded


def _branches(names: Iterable[str]) -> dict[str, str]:
    """Return the gain that folds into each tensor of a layer, by its name there; without those that none does."""
    names = [*names]
    after = next((pair for pair in NORM_AFTER if any(name.startswith(pair[1]) for name in names)), None)
    query = next((p for p in (QUERY_NORM, FUSED_QUERY) if any(map(p.match, names))), QUERY)
    found: dict[str, str] = {}
    for name in names:
        if after and name.startswith(after):
            found[name] = "attention" if name.startswith(after[0]) else "mlp"
        elif not after and ATTENTION_OUT.match(name):
            found[name] = "attention"
        elif not after and MLP_OUT.match(name):
            found[name] = "mlp"
        elif query.match(name):
            found[name] = "temperature"
    return found


class Branches:
    """The weights of a model that gains fold into, by their names and the model's config."""

    def __init__(self, shapes: Shapes, config: Mapping[str, Any]) -> None:
        """Raises SourceError for an architecture whose layers are not known."""
        self._shapes, self._config = shapes, text_config(config)
        self._kind = str(self._config.get("model_type"))
        self._stack = stack_of(config, shapes)
        if self._kind not in KNOWN:
            raise SourceError(
                f"gains: llmevo does not know how the layers of {self._kind} (config.json: model_type) add up, so no"
                " gain can be folded into their weights; leave the gains out"
            )
        if self._config.get("do_layer_norm_before") is False:
            raise SourceError(
                "gains: config.json says do_layer_norm_before: false: a norm follows each residual sum, and a branch's"
                " gain cannot be folded into weights; leave the gains out"
            )
        layers: dict[int, dict[str, str]] = {}
        for name in shapes:
            if (layer := self._stack.layer(name)) is not None:
                layers.setdefault(layer, {})[self._rest(name)] = name
        self._layers = {layer: [*names.values()] for layer, names in layers.items()}
        self._branches = {of[rest]: kind for of in layers.values() for rest, kind in _branches(of).items()}

    @property
    def all_names(self) -> list[str]:
        """Every tensor of the model."""
        return [*self._shapes]

    @property
    def depth(self) -> int:
        """The number of layers."""
        return self._stack.depth

    def names(self, layers: Iterable[int]) -> list[str]:
        """Return the tensors of some layers."""
        return [name for layer in layers for name in self._layers.get(layer, [])]

    def fold(self, name: str, gains: Gains) -> Fold | None:
        """Return the factor of one tensor of a layer; None where the gains leave it as it is."""
        kind = self.branch(name)
        factor = getattr(gains, kind) if kind else 1.0
        if factor == 1.0:
            return None
        is_norm = "norm" in name.removesuffix(".weight").rpartition(".")[2] and self._kind in ONE_MORE
        rest = self._rest(name)
        part = self._part(rest, self._shapes[name]) if kind == "temperature" and FUSED_QUERY.match(rest) else None
        return Fold(factor, is_norm, part)

    def branch(self, name: str) -> str:
        """Return the gain that folds into a tensor: `attention`, `mlp`, `temperature`, or empty."""
        return self._branches.get(name, "")

    def check(self, gains: Gains, layers: Iterable[int]) -> None:
        """Raise SourceError where a gain has no weight to fold into in these layers."""
        layers = [*layers]
        if self._config.get("apply_residual_connection_post_layernorm") and 0.0 in (gains.attention, gains.mlp):
            raise SourceError(
                "gains: config.json says apply_residual_connection_post_layernorm: true: the residual stream is"
                " normalized in every layer, so one with gains of 0 is not the identity; leave the layer out instead"
            )
        if gains.temperature != 1.0:
            self._check_temperature(layers)
        found = {self.branch(name) for name in self.names(layers)}
        span = f"layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
        for key in ("attention", "mlp", "temperature"):
            # The identity needs no branch to be there.
            if (gain := getattr(gains, key)) not in (0.0, 1.0) and key not in found:
                part = "softmax attention" if key == "temperature" else f"{key} branch"
                raise SourceError(f"gains: {key} is {gain:g}, and there is no {part} in {span}; leave it out")

    def _check_temperature(self, layers: Iterable[int]) -> None:
        clipped = self._config.get("clip_qkv") or (self._config.get("attn_config") or {}).get("clip_qkv")
        if clipped:
            raise SourceError(
                f"gains: temperature cannot be folded: the model clips queries at {clipped} (config.json: clip_qkv);"
                " leave it out"
            )
        if self._kind == "llama4_text" and self._config.get("use_qk_norm", True):
            raise SourceError(
                "gains: temperature cannot be folded: the model normalizes queries without weights (config.json:"
                " use_qk_norm: true), which undoes every scale; leave it out"
            )
        for name in self.names(layers):  # raise for a fused weight whose rows are not known
            if FUSED_QUERY.match(self._rest(name)):
                self._part(self._rest(name), self._shapes[name])

    def scales(self, gains: Gains, layers: Iterable[int]) -> list[tuple[str, float]] | None:
        """Return mergekit's filters for `scale` with their factors, in which the gains are exact; None without such.

        A filter holds for exactly the tensors of its factor; none has a fused query or a norm of 1 + w.
        """
        folds = {name: self.fold(name, gains) for name in self.names(layers)}
        found: dict[str, float] = {}
        for name, fold in folds.items():
            if fold is None:
                continue
            module = name.removesuffix(".weight").removesuffix(".bias").split(".")
            fitting = (".".join(module[-length:]) for length in (1, 2))
            same = {other for other, of in folds.items() if of == fold}
            filter_ = next((f for f in fitting if {other for other in folds if f in other} <= same), None)
            outside = filter_ is not None and any(
                filter_ in other for other in self._shapes if self._stack.layer(other) is None
            )
            if fold.one_more or fold.part or filter_ is None or outside:
                return None
            found[filter_] = fold.factor
        return [*found.items()]

    def _rest(self, name: str) -> str:
        numbered = self._stack.numbered(name)
        return numbered[1] if numbered else name

    def _part(self, rest: str, shape: tuple[int, ...]) -> Part:
        """Return the query's rows of a fused weight. Raises SourceError where its order is not known."""
        config, kind = self._config, self._kind
        heads = int(config.get("num_attention_heads") or config.get("n_head") or config.get("n_heads") or 0)
        rows = shape[-1] if kind == "gpt2" else shape[0]
        if kind == "gpt2":
            return Part(-1, rows, rows // 3)
        if kind == "phi3":
            width = int(config.get("head_dim") or config["hidden_size"] // heads)
            return Part(0, rows, heads * width)
        if kind == "mpt":
            return Part(0, rows, rows // 3)
        if kind in ("gpt_neox", "bloom"):
            return Part(0, rows // heads, rows // heads // 3)
        if kind == "falcon":
            width = int(config["hidden_size"]) // heads
            if config.get("new_decoder_architecture"):
                queries = heads // int(config.get("num_kv_heads") or heads)
                return Part(0, (queries + 2) * width, queries * width)
            multi = config.get("multi_query", True)
            return Part(0, rows, rows - 2 * width) if multi else Part(0, 3 * width, width)
        raise SourceError(
            f"gains: temperature cannot be folded: the order of rows in {rest} of {kind} is not known; leave it out"
        )
