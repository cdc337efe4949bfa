"""Tiny random checkpoints of many decoder families, saved under the names that models are published with.

`new_family(folder, name)` writes a base and two fine-tunes of it, each with a tokenizer, in well under a second.
`FAMILIES` says which there are; `make families` checks each of them in every engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from support.checkpoints import quietly
from support.tiny_model import LETTERS, POSITIONS, SPECIAL, tiny_tokenizer

MODELS = ("base", "one", "two")

SIZE: Mapping[str, Any] = {
    "vocab_size": len(SPECIAL) + len(LETTERS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
"""Keys of every config, where a family does not set them otherwise. vLLM's attention takes no narrower heads."""

DENSE, HYBRID, MOE, VISION = "dense", "hybrid", "mixture of experts", "vision-language"


@dataclass(frozen=True)
class Family:
    """A config that transformers makes a tiny model of."""

    kind: str
    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Keys over those of `SIZE`; a value of None leaves the key to transformers' default."""
    text: Mapping[str, Any] | None = None
    """For a vision-language model: the keys of its text_config over `SIZE`."""
    vllm: str = ""
    """Why vLLM does not run it, where it does not."""


NUMBER = 4
"""The number of experts in a layer of every mixture of experts; no other weight has as many rows."""

EXPERTS: dict[str, Any] = {"num_experts": NUMBER, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 32}
DELTA: dict[str, Any] = {  # gated delta-rule layers
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_hidden_layers": 4,
}
ROUTED: dict[str, Any] = {
    "n_routed_experts": NUMBER,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
LATENT: dict[str, Any] = {  # multi-head latent attention, and experts after the first layer
    "head_dim": None,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    **ROUTED,
}
QWEN_EYES: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "in_channels": 3}
ROPE_3D: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
EYES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}

FAMILIES: Mapping[str, Family] = {
    # Dense
    "Llama": Family(DENSE, "llama"),
    "Llama, tied": Family(DENSE, "llama", {"tie_word_embeddings": True}),
    "Mistral": Family(DENSE, "mistral", {"sliding_window": None}),
    "Ministral": Family(DENSE, "ministral", {"sliding_window": 32}),
    "Qwen2": Family(DENSE, "qwen2", {"head_dim": None, "hidden_size": 128}),
    "Qwen3": Family(DENSE, "qwen3", {"tie_word_embeddings": True}),
    "Gemma": Family(DENSE, "gemma", {"tie_word_embeddings": True}),
    "Gemma 2": Family(DENSE, "gemma2", {"tie_word_embeddings": True, "query_pre_attn_scalar": 32}),
    "Gemma 3 (text)": Family(DENSE, "gemma3_text", {"tie_word_embeddings": True, "query_pre_attn_scalar": 32}),
    "Phi": Family(DENSE, "phi", {"num_key_value_heads": 4, "head_dim": None, "hidden_size": 128}),
    "Phi-3": Family(DENSE, "phi3", {"head_dim": None, "hidden_size": 128}),
    "OLMo": Family(DENSE, "olmo", {"head_dim": None, "hidden_size": 128}),
    "OLMo 2": Family(DENSE, "olmo2", {"head_dim": None, "hidden_size": 128}),
    "OLMo 3": Family(DENSE, "olmo3", {"head_dim": None, "hidden_size": 128}),
    "SmolLM3": Family(DENSE, "smollm3", {"head_dim": None, "hidden_size": 128}),
    "Granite": Family(DENSE, "granite", {"head_dim": None, "hidden_size": 128, "logits_scaling": 2.0}),
    "Cohere": Family(DENSE, "cohere", {"tie_word_embeddings": True, "head_dim": None, "hidden_size": 128}),
    "Cohere 2": Family(DENSE, "cohere2", {"tie_word_embeddings": True}),
    "StableLM": Family(DENSE, "stablelm", {"head_dim": None, "hidden_size": 128}),
    "StarCoder2": Family(DENSE, "starcoder2", {"head_dim": None, "hidden_size": 128}),
    "GPT-2": Family(DENSE, "gpt2", {"n_positions": POSITIONS, "hidden_size": 128, "tie_word_embeddings": True}),
    "GPT-NeoX": Family(DENSE, "gpt_neox", {"hidden_size": 128}),
    "GPT-J": Family(DENSE, "gptj", {"hidden_size": 128, "rotary_dim": 16}),
    "Falcon": Family(DENSE, "falcon", {"hidden_size": 128, "head_dim": None, "tie_word_embeddings": True}),
    "GLM-4": Family(DENSE, "glm4", {"partial_rotary_factor": 0.5}),
    "Nemotron": Family(DENSE, "nemotron"),
    "EXAONE 4": Family(DENSE, "exaone4", {"sliding_window": 32}),
    "Ernie 4.5": Family(DENSE, "ernie4_5"),
    "Hunyuan": Family(DENSE, "hunyuan_v1_dense"),
    "Seed-OSS": Family(DENSE, "seed_oss"),
    "OPT": Family(DENSE, "opt", {"hidden_size": 128, "ffn_dim": 96, "word_embed_proj_dim": 128}),
    "BLOOM": Family(DENSE, "bloom", {"hidden_size": 128, "n_layer": 2, "n_head": 4, "tie_word_embeddings": True}),
    "MPT": Family(DENSE, "mpt", {"d_model": 128, "n_layers": 2, "n_heads": 4, "tie_word_embeddings": True}),
    # Hybrids and state-space models
    "Qwen3-Next": Family(HYBRID, "qwen3_next", {**DELTA, **EXPERTS, **SHARED}),
    "Qwen3.5 (text)": Family(HYBRID, "qwen3_5_text", DELTA),
    "Granite 4 (hybrid)": Family(
        HYBRID,
        "granitemoehybrid",
        {
            **MAMBA,
            "mamba_n_heads": 8,
            "hidden_size": 128,
            "head_dim": None,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": NUMBER,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
        },
    ),
    "Falcon-H1": Family(
        HYBRID,
        "falcon_h1",
        {**MAMBA, "mamba_n_heads": 8, "mamba_d_ssm": 256, "hidden_size": 128, "lm_head_multiplier": 0.5},
    ),
    "Jamba": Family(
        HYBRID,
        "jamba",
        {
            "hidden_size": 128,
            "head_dim": None,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": NUMBER,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "Bamba": Family(
        HYBRID, "bamba", {**MAMBA, "mamba_n_heads": 8, "hidden_size": 128, "head_dim": None, "attn_layer_indices": [1]}
    ),
    "Zamba2": Family(
        HYBRID,
        "zamba2",
        {
            "head_dim": None,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "mamba_d_state": 16,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "tie_word_embeddings": True,
        },
    ),
    "Mamba": Family(HYBRID, "mamba", {"state_size": 8, "time_step_rank": 4, "tie_word_embeddings": True}),
    "Mamba 2": Family(
        HYBRID,
        "mamba2",
        {
            "hidden_size": 128,
            "state_size": 16,
            "num_heads": 8,
            "head_dim": 32,
            "n_groups": 1,
            "chunk_size": 8,
            "tie_word_embeddings": True,
        },
    ),
    "LFM2": Family(HYBRID, "lfm2", {"head_dim": None, "hidden_size": 128, "layer_types": ["conv", "full_attention"]}),
    "Nemotron-H": Family(
        HYBRID,
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mlp"],
            "num_hidden_layers": 3,
            "hidden_size": 128,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "ssm_state_size": 16,
            "chunk_size": 8,
        },
    ),
    # Mixtures of experts
    "Mixtral": Family(MOE, "mixtral", {"num_local_experts": NUMBER, "sliding_window": None}),
    "Qwen2-MoE": Family(MOE, "qwen2_moe", {**EXPERTS, **SHARED, "head_dim": None, "hidden_size": 128}),
    "Qwen3-MoE": Family(MOE, "qwen3_moe", EXPERTS),
    "OLMoE": Family(
        MOE, "olmoe", {"num_experts": NUMBER, "num_experts_per_tok": 2, "head_dim": None, "hidden_size": 128}
    ),
    "gpt-oss": Family(
        MOE,
        "gpt_oss",
        {"num_local_experts": NUMBER, "num_experts_per_tok": 2, "sliding_window": 32, "rope_parameters": None},
    ),
    "DeepSeek-V2": Family(MOE, "deepseek_v2", LATENT),
    "DeepSeek-V3": Family(MOE, "deepseek_v3", {**LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}),
    "GLM-4.5 (MoE)": Family(
        MOE,
        "glm4_moe",
        ROUTED,
    ),
    "Granite MoE": Family(
        MOE, "granitemoe", {"num_local_experts": NUMBER, "num_experts_per_tok": 2, "head_dim": None, "hidden_size": 128}
    ),
    "PhiMoE": Family(MOE, "phimoe", {"num_local_experts": NUMBER, "head_dim": None, "hidden_size": 128}),
    "Ernie 4.5 MoE": Family(
        MOE,
        "ernie4_5_moe",
        {"moe_num_experts": NUMBER, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 32},
    ),
    "MiniMax-M2": Family(MOE, "minimax_m2", {"num_local_experts": NUMBER, "num_experts_per_tok": 2}),
    "Llama 4 (text)": Family(
        MOE,
        "llama4_text",
        {
            "num_local_experts": NUMBER,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 32,
        },
    ),
    # Vision-language models
    "Qwen2.5-VL": Family(
        VISION,
        "qwen2_5_vl",
        {
            "vision_config": {
                **QWEN_EYES,
                "hidden_size": 32,
                "intermediate_size": 48,
                "out_hidden_size": 128,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
        },
        {"head_dim": None, "hidden_size": 128, "rope_parameters": ROPE_3D},
    ),
    "Qwen3-VL": Family(
        VISION,
        "qwen3_vl",
        {
            "vision_config": {
                **QWEN_EYES,
                "hidden_size": 32,
                "intermediate_size": 48,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
        },
        {"rope_parameters": {**ROPE_3D, "mrope_interleaved": True}},
    ),
    "Gemma 3": Family(
        VISION,
        "gemma3",
        {
            "vision_config": {**EYES, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
            "tie_word_embeddings": True,
        },
        {"query_pre_attn_scalar": 32, "model_type": "gemma3_text", "tie_word_embeddings": True},
    ),
    "Mistral 3": Family(
        VISION,
        "mistral3",
        {"vision_config": {**EYES, "model_type": "pixtral", "head_dim": 16}},
        {"model_type": "mistral", "sliding_window": None},
    ),
    "LLaVA": Family(
        VISION,
        "llava",
        {"vision_config": {**EYES, "model_type": "clip_vision_model"}},
        {"model_type": "llama"},
    ),
}
"""Decoder families by the name that their documentation uses."""

PLACES: Mapping[str, int] = {
    **dict.fromkeys(("image_token_id", "image_token_index"), 90),
    "video_token_id": 91,
    **dict.fromkeys(("vision_start_token_id", "boi_token_index"), 92),
    **dict.fromkeys(("vision_end_token_id", "eoi_token_index"), 93),
}
"""Tokens for images, within the tiny vocabulary."""


def config_of(name: str, **changes: Any) -> Any:
    """The family's config; `changes` are keys of the text model's over the family's."""
    family = FAMILIES[name]
    if family.text is None:
        given = {**SIZE, **family.changes, **changes}
        return AutoConfig.for_model(family.model_type, **{key: of for key, of in given.items() if of is not None})
    text = {key: of for key, of in {**SIZE, **family.text, **changes}.items() if of is not None}
    tied = {"tie_word_embeddings": text["tie_word_embeddings"]}
    return AutoConfig.for_model(family.model_type, **{**PLACES, **tied, **family.changes, "text_config": text})


def new_model(name: str, **changes: Any) -> Any:
    """The family's model on the CPU in float32, as transformers initialises it."""
    config = config_of(name, **changes)
    kind = AutoModelForImageTextToText if FAMILIES[name].kind == VISION else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return quietly(lambda: kind.from_config(config)).eval()


def weights_in(model: Any) -> dict[str, Tensor]:
    """Every floating-point weight and saved buffer of a model, once each, by its name in transformers."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if weight.is_floating_point():
            found.setdefault(weight.data_ptr(), (name, weight))
    return dict(found.values())


def randomise(model: Any, seed: int, tuned: int | None = None) -> None:
    """Give a model random weights: the same base for one `seed`, and a fine-tune of it for each `tuned`.

    Vectors (norms, biases, the state-space layers' constants) keep near their initial values, which can be 1 or a
    logarithm; matrices are drawn anew, wide enough that the likeliest token is far ahead.
    """
    random = torch.Generator().manual_seed(seed)
    other = torch.Generator().manual_seed(seed * 1000 + (tuned or 0) + 1)
    with torch.no_grad():
        for weight in weights_in(model).values():
            noise = torch.randn(weight.shape, generator=random)
            value = weight.float() + 0.1 * noise if weight.ndim < 2 else 0.25 * noise
            if tuned is not None:
                value += 0.1 * torch.randn(weight.shape, generator=other)
            weight.copy_(value)


def new_family(folder: Path, name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save `base` and its fine-tunes `one` and `two` in `folder`, as transformers saves them, with a tokenizer each.

    `changes` are keys of the text model's config.
    """
    for place, model in enumerate(MODELS):
        made = new_model(name, **changes)
        randomise(made, seed, None if model == "base" else place)
        made = made.to(dtype)
        quietly(lambda made=made, model=model: made.save_pretrained(folder / model))
        tiny_tokenizer().save_pretrained(folder / model)
    return folder
