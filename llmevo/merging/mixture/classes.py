"""The classes of transformers that a mixture of dense models can be: names of tensors, and config.json.

A class fits a base if its attention, norms and rotary embeddings are the base's; then a mixture of copies of one model
is that model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmevo.errors import SourceError, nearest
from llmevo.merging.mixture.mixture import Mixture
from llmevo.models.architecture import EXPERT_LAYOUTS, PROJECTIONS, ExpertLayout

SHARED = 64
"""Neurons of a shared expert that adds 0, in a class that must have one."""

KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
    *("attention_dropout", "rope_theta", "rope_scaling", "rope_parameters", "dtype", "torch_dtype"),
    *("sliding_window", "use_sliding_window", "max_window_layers"),
)
"""The keys of a dense model's config that mean the same in a mixture's."""

DEFAULTS = (
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id"),
)
"""Of these, keys that a config may leave out and whose defaults differ between classes."""


@dataclass(frozen=True)
class MixtureClass:
    """A class of mixtures in transformers and vLLM."""

    model_type: str
    architecture: str
    count: str
    """The config's key for the number of experts."""
    has_dense_layers: bool = True
    """Whether layers may have no experts. Where not, these layers have copies of one MLP as experts."""
    has_shared_expert: bool = False

    @property
    def layout(self) -> ExpertLayout:
        """Where the experts are, and the dense models that the class fits."""
        return EXPERT_LAYOUTS[self.model_type]

    def router(self, layer: str) -> str:
        """Return the name of a layer's router; `layer` is such as `model.layers.0.`."""
        return f"{layer}{self.layout.module}.gate.weight"

    def shared_gate(self, layer: str) -> str:
        """Return the name of the gate of a layer's shared expert."""
        return f"{layer}{self.layout.module}.shared_expert_gate.weight"

    def expert(self, layer: str, place: int, projection: str) -> str:
        """Return the name of one matrix of an expert, by the dense model's name of the projection."""
        return (
            f"{layer}{self.layout.module}.experts.{place}.{self.layout.matrices[PROJECTIONS.index(projection)]}.weight"
        )


CLASSES: Mapping[str, MixtureClass] = {
    of.model_type: of
    for of in (
        MixtureClass(
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            count="num_local_experts",
            has_dense_layers=False,
        ),
        MixtureClass(
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            count="num_experts",
        ),
        MixtureClass(
            model_type="qwen2_moe",
            architecture="Qwen2MoeForCausalLM",
            count="num_experts",
            has_shared_expert=True,
        ),
    )
}

NAMES = {"mixtral": "mixtral", "qwen3": "qwen3_moe", "qwen": "qwen2_moe", "qwen2": "qwen2_moe"}
"""Other names of the classes, those of mergekit-moe's `architecture` among them."""


def class_of(config: Mapping[str, Any], mixture: Mixture) -> MixtureClass:
    """Return the class of a mixture whose base has this config.json.

    Raises SourceError where no class fits the base, and for a class that does not.
    """
    kind = str(config.get("model_type"))
    fitting = next((of for of in CLASSES.values() if kind in of.layout.dense), None)
    if fitting is None:
        known = ", ".join(sorted(base for of in CLASSES.values() for base in of.layout.dense))
        raise SourceError(f"no class of mixtures fits model_type {kind!r}; those of {known} have one")
    if mixture.architecture:
        asked = mixture.architecture.lower().replace(" ", "_").replace("-", "_")
        asked = NAMES.get(asked, asked)
        if asked not in CLASSES:
            raise SourceError(f"architecture {mixture.architecture!r} is unknown{nearest(asked, CLASSES)}")
        if CLASSES[asked] != fitting:
            raise SourceError(
                f"architecture {mixture.architecture!r} does not fit model_type {kind!r}, whose attention differs;"
                f" leave it out, or write {fitting.model_type}"
            )
    if mixture.shared_expert and not fitting.has_shared_expert:
        raise SourceError(f"{fitting.architecture} has no shared expert; leave it out")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key) and (key == "mlp_bias" or kind != "qwen3"):
            raise SourceError(f"{key}: true in config.json: {fitting.architecture} has no such biases")
    if config.get("use_sliding_window"):
        raise SourceError(
            f"use_sliding_window: true in config.json: {fitting.architecture} has another rule for the layers of the"
            " window"
        )
    return fitting


def mixture_config(config: Mapping[str, Any], mixture: Mixture) -> dict[str, Any]:
    """Return config.json of a mixture over a dense model with this one. Raises SourceError, see `class_of`."""
    from transformers import AutoConfig  # takes a second

    of = class_of(config, mixture)
    given = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    complete: Any = AutoConfig.for_model(**given)
    made = {key: config[key] for key in KEPT if key in config}
    made |= {key: getattr(complete, key) for key in DEFAULTS if key not in made and hasattr(complete, key)}
    ropes = [value for key in ("rope_parameters", "rope_scaling") if isinstance(value := config.get(key), Mapping)]
    if "rope_theta" not in made and not any("rope_theta" in value for value in ropes):
        made["rope_theta"] = complete.rope_parameters["rope_theta"]
    made["tie_word_embeddings"] = bool(complete.tie_word_embeddings)
    made |= {"architectures": [of.architecture], "model_type": of.model_type}
    made |= {of.count: len(mixture.experts), "num_experts_per_tok": mixture.experts_per_token}
    if of.has_dense_layers:
        dense = [layer for layer in range(int(complete.num_hidden_layers)) if not mixture.has_experts(layer)]
        made |= {"moe_intermediate_size": complete.intermediate_size, "norm_topk_prob": True}
        made |= {"decoder_sparse_step": 1, "mlp_only_layers": dense, "use_sliding_window": False}
        if config.get("attention_bias"):
            made["attention_bias"] = True
    elif config.get("model_type") != "mistral":
        made["sliding_window"] = None
    if of.has_shared_expert:
        made["shared_expert_intermediate_size"] = complete.intermediate_size if mixture.shared_expert else SHARED
    return made


@dataclass(frozen=True)
class Matrix:
    """One matrix of a mixture that comes from a dense MLP's."""

    name: str
    expert: int | None
    """The place of the expert that gives it; None for the recipe's own merge."""
    is_shared: bool = False


def matrices(of: MixtureClass, mixture: Mixture, layer: int, start: str, projection: str) -> Iterator[Matrix] | None:
    """Return the matrices of a mixture that take the place of one projection of a dense layer; None where it stays.

    `start` is the beginning of the layer's names, such as `model.layers.0.`.
    """
    if not mixture.has_experts(layer) and of.has_dense_layers:
        return None
    routed = mixture.has_experts(layer)

    def found() -> Iterator[Matrix]:
        for place in range(len(mixture.experts)):
            yield Matrix(of.expert(start, place, projection), place if routed else None)
        if of.has_shared_expert:
            yield Matrix(f"{start}{of.layout.module}.shared_expert.{projection}.weight", None, is_shared=True)

    return found()
