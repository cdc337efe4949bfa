"""The checks of an engine before a run: that it can load the model, and that its merges equal exported ones."""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from llmevo.engines.base import Engine
from llmevo.errors import CandidateError, EngineError, SourceError, UserError
from llmevo.merging.merger import not_finite
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.conversion import Places, class_of
from llmevo.models.files import partial_folder
from llmevo.models.sources import Sources

SHAPE_KEYS = (
    (r"embed|wte|lm_head|word_embeddings", ("vocab_size", "hidden_size")),
    (r"[kv]_proj", ("num_key_value_heads", "num_attention_heads", "head_dim", "hidden_size")),
    (r"attn|attention", ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")),
    (r"mlp|feed_forward|ffn", ("intermediate_size", "hidden_size")),
    ("", ("hidden_size",)),
)
"""(pattern of a weight's name, keys of the config that set its shape); the first match counts."""


def check_loadable(folder: Path, shapes: Mapping[str, tuple[int, ...]], in_place: bool = True) -> None:
    """Raise SourceError unless transformers' model of a folder's config has the weights of its checkpoint.

    Reads no weights: the model is made on the meta device. `in_place` is for an engine that writes each weight into
    transformers' model, as `hf` does and vLLM does not: then the model has to use every tensor of the checkpoint. Left
    out are tensors that transformers ignores on purpose, such as those for multi-token prediction.
    """
    try:
        config: Any = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model: Any = class_of(config).from_config(config)
    except Exception as error:  # a model's code raises any error for a config that makes no sense
        reason = " ".join(str(error).split())[:300]
        raise SourceError(
            f"{folder}: transformers makes no language model of its config.json ({type(error).__name__}: {reason})"
        ) from error
    config = model.config.get_text_config()
    places = Places(model, shapes)
    stored = ((name, torch.empty(shape, device="meta")) for name, shape in shapes.items())
    try:
        for name, tensor, weight in places.pairs(stored):
            if weight.shape != tensor.shape:
                keys = next(keys for pattern, keys in SHAPE_KEYS if re.search(pattern, name))
                values = {key: value for key in keys if (value := getattr(config, key, None)) is not None}
                listed = ", ".join(f"{key}: {json.dumps(value)}" for key, value in values.items())
                raise SourceError(
                    f"{folder}: with {listed} in config.json {name} is {tuple(weight.shape)}, in the checkpoint it is"
                    f" {tuple(tensor.shape)}; download both files of one model"
                )
    except ValueError as error:
        raise SourceError(f"{folder}: in its checkpoint {error}; download the model again") from error
    strange = [name for name in shapes if name not in places.parts and not places.ignored(name)]
    if (missing := places.missing) and not strange:
        raise SourceError(
            f"{folder}: its checkpoint lacks {len(missing)} of the weights of {type(model).__name__}, the first is"
            f" {missing[0]}; every candidate would lack them: download the model again"
        )
    if strange and in_place:
        parts = [f"the checkpoint has {strange[0]}"]
        parts += [f"the model has {missing[0]}"] if missing else []
        raise SourceError(
            f"{folder}: transformers' {type(model).__name__} does not use all weights of the checkpoint"
            f" ({', '.join(parts)}; {len({*missing, *strange})} such names), so the engine hf would score another model"
            " than the one that is exported; set engine.backend: vllm, or use models of another architecture"
        )


def check_engine(engine: Engine, recipe: Recipe, sources: Sources, seed: int) -> bool:
    """Merge `recipe` into the engine, export it, and compare the two: a wrong merge raises nothing, it gives wrong
    scores.

    Writes the model to the temporary folder (TMPDIR) and removes it again. Return False if the recipe cannot be
    merged. Raises EngineError when the two differ, and SourceError if the reason is a model whose weights are not
    finite.
    """
    try:
        engine.swap(recipe)
    except CandidateError:
        return False
    with partial_folder(Path(tempfile.gettempdir()) / "llmevo-check") as folder:
        try:
            write_model(recipe, sources, folder / "model", seed, trim=False)
        except UserError as error:
            if type(error) is not UserError:  # the recipe or a model is at fault, not the disk
                raise
            raise UserError(
                f"the check of the engine needs room for one model in {folder} ({error}); set TMPDIR to a larger disk,"
                " or skip the check with engine.self_check: false"
            ) from error
        wrong = engine.differences(folder / "model")
    if wrong and (reason := not_finite(sources, recipe.references)):
        raise SourceError(reason)
    if wrong:
        raise EngineError(
            "the engine does not hold the weights that were merged into it, so its scores would be wrong:"
            f" {', '.join([*wrong][:5])} {'differs' if len(wrong) == 1 else 'differ'} from the exported model"
        )
    return True
