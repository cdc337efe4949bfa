"""Whether transformers runs a checkpoint under the names and shapes it has on disk, found out without its weights."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmevo.errors import SourceError
from llmevo.models.architecture import LAYER, depth_of

KEYS = (
    (r"embed|wte|lm_head|word_embeddings", ("vocab_size", "hidden_size")),
    (r"[kv]_proj", ("num_key_value_heads", "num_attention_heads", "head_dim", "hidden_size")),
    (r"attn|attention", ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")),
    (r"mlp|feed_forward|ffn", ("intermediate_size", "hidden_size")),
    ("", ("hidden_size",)),
)
"""What a weight's shape follows from: a part of its name, and keys of the config."""

Shapes = Mapping[str, tuple[int, ...]]


def check_loadable(folder: Path, shapes: Shapes, in_place: bool = True) -> None:
    """Raise SourceError unless transformers' model of a folder's config has the weights of its checkpoint.

    Use it before anything is computed: the weights are not read, the model is made on the meta device. `in_place` is
    for an engine that writes each weight of a merge into the running model under its own name, as `hf` does and vLLM
    does not: then also the names have to be the same. Layers beyond those that the config names are for the prediction
    of several tokens (see `planning.check_layers`); no merge has them.
    """
    model = _made(folder)
    config = model.config.get_text_config()
    held: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, shape in shapes.items():
        if name in held and tuple(held[name].shape) != shape:
            raise SourceError(
                f"{folder}: with {_told(config, name)} in config.json {name} is {tuple(held[name].shape)}, in the"
                f" checkpoint it is {shape}; download both files of one model"
            )
    # Of a weight under two names, such as a tied output head, one is enough.
    own = {id(weight) for name, weight in held.items() if name in shapes}
    missing = [name for name, weight in held.items() if weight.requires_grad and id(weight) not in own]
    depth = depth_of(vars(config))
    merged = [name for name in shapes if not ((match := LAYER.match(name)) and int(match[2]) >= depth)]
    strange = [name for name in merged if name not in held]
    if missing and not strange:
        raise SourceError(
            f"{folder}: its checkpoint lacks {len(missing)} of the weights of {type(model).__name__}, the first is"
            f" {missing[0]}; every candidate would lack them: download the model again"
        )
    if strange and in_place:
        parts = [f"the checkpoint has {strange[0]}"]
        parts += [f"the running model has {missing[0]}"] if missing else []
        raise SourceError(
            f"{folder}: transformers holds the weights of {config.model_type} under other names than the checkpoint"
            f" ({', '.join(parts)}; {len({*missing, *strange})} such names), so the engine hf cannot replace them one"
            " by one; set engine.backend: vllm, or take models of another architecture"
        )


def _made(folder: Path) -> Any:
    """The model of a folder's config, without weights."""
    try:
        config: Any = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a model's code raises for a config that makes no sense
        reason = " ".join(str(error).split())[:300]
        raise SourceError(
            f"{folder}: transformers makes no language model of its config.json ({type(error).__name__}: {reason})"
        ) from error


def _told(config: Any, name: str) -> str:
    """The keys that decide a weight's shape, with their values."""
    keys = next(keys for part, keys in KEYS if re.search(part, name))
    values = {key: value for key in keys if (value := getattr(config, key, None)) is not None}
    return ", ".join(f"{key}: {json.dumps(value)}" for key, value in values.items())
