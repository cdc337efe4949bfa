"""Tiny GGUF files, written by the gguf package alone: donors of metadata for exports."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from transformers import AutoConfig

from llmevo.models.tokenizer import vocabulary


def new_donor(file: Path, model: Path, architecture: str, shapes: dict[str, tuple[int, ...]], **changes: Any) -> Path:
    """Write a GGUF file of a saved model: its metadata, its tokens, and tensors of zeros in these shapes.

    `changes` replace metadata; `tokens` is the vocabulary, `rope_freqs` the numbers of the tensor by that name.
    """
    config: Any = AutoConfig.from_pretrained(model)
    factors = changes.pop("rope_freqs", None)
    tokens = changes.pop("tokens", None) or sorted(vocabulary(model), key=lambda token: vocabulary(model)[token])
    tokens += [f"[PAD{number}]" for number in range(len(tokens), config.vocab_size)]
    writer = GGUFWriter(file, architecture)
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
    }
    for key, value in {**numbers, **changes}.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    if getattr(config, "head_dim", None):
        for key in ("attention.key_length", "attention.value_length"):
            writer.add_uint32(f"{architecture}.{key}", config.head_dim)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope_parameters["rope_theta"])
    writer.add_name("tiny")
    writer.add_file_type(0)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.merges", [f"{tokens[0]} {tokens[1]}"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 3)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


LLAMA = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
GEMMA = {
    **LLAMA,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def shapes_of(weights: dict[str, Any], layers: dict[str, str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's tensors by their names in GGUF."""
    found: dict[str, tuple[int, ...]] = {}
    for name, weight in weights.items():
        module, _, end = name.rpartition(".")
        new = next((new for new, old in OUTSIDE.items() if old == module), None)
        if new is None:
            _, _, number, rest = module.split(".", 3)
            new = f"blk.{number}." + next(new for new, old in layers.items() if old == rest)
        found[f"{new}.{end}"] = tuple(weight.shape)
    return found
