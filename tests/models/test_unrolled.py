"""A checkpoint that runs its layers by a list is read as an ordinary model of the same function."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralForCausalLM

from llmevo.errors import SourceError
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from support.checkpoints import quietly
from support.families import new_model, randomise

LAYERS = [0, 1, 2, 1, 2, 3, 5]
SCALES = [0.75, 1.0, 0.5, 1.25, -0.8, 1.0, 0.6]
MODEL = ModelReference.model_validate("evo")
TOKENS = torch.arange(5, 15).unsqueeze(0)


def new_rolled(folder: Path, layers: list[int], scales: list[float], **changes: Any) -> Any:
    made = new_model("Mistral", num_hidden_layers=6, **changes)
    randomise(made, 0)
    quietly(lambda: made.save_pretrained(folder))
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hops": len(layers), "model_type": "evomistral", "architectures": ["EvoMistralForCausalLM"]}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_evomistral.EvoMistralForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    lists = {
        "model.input_layers": torch.tensor(layers, dtype=torch.int32),
        "model.input_scales": torch.tensor(scales, dtype=torch.float32),
    }
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, **lists}, folder / "model.safetensors", {"format": "pt"})
    return made.double()


@torch.no_grad()
def by_hops(model: Any) -> Tensor:
    """The logits as the published code computes them: the MLP's output is kept apart from the residual stream."""
    hidden, residual = model.model.embed_tokens(TOKENS), torch.zeros(())
    positions = torch.arange(TOKENS.shape[1]).unsqueeze(0)
    rotary = model.model.rotary_emb(hidden, positions)
    mask = torch.full((TOKENS.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)[None, None]
    for number, scale in zip(LAYERS, SCALES, strict=True):
        layer = model.model.layers[number]
        residual = residual + hidden * scale
        hidden, _ = layer.self_attn(layer.input_layernorm(residual), position_embeddings=rotary, attention_mask=mask)
        residual = residual + hidden
        hidden = layer.mlp(layer.post_attention_layernorm(residual))
    return model.lm_head(model.model.norm(residual + hidden))


def test_the_unrolled_model_computes_the_same(tmp_path: Path) -> None:
    rolled = new_rolled(tmp_path / "evo", LAYERS, SCALES)
    sources = Sources.open([MODEL], tmp_path)
    assert sources.depth(MODEL) == 7
    write_model(Recipe.of_one(MODEL), sources, tmp_path / "out")
    made = quietly(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)).eval()
    assert isinstance(made, MistralForCausalLM)
    want = by_hops(rolled)
    with torch.no_grad():
        assert torch.allclose(made(input_ids=TOKENS).logits, want, rtol=1e-5, atol=1e-5)
    reasons = {*sources.left_out(MODEL).values()}
    assert reasons == {"no hop runs its layer", "its numbers are in the weights"}


@pytest.mark.parametrize(
    ("layers", "scales", "tied", "reason"),
    [
        ([0, 6], [1.0, 1.0], False, "layers from 0 to 5; got 2 and 2 entries, layers from 0 to 6"),
        ([0, 1], [1.0], False, "got 2 and 1 entries"),
        ([0, 1], [0.5, 1.0], True, "input_scales begins with 0.5, and the embeddings it scales are the head as well"),
    ],
)
def test_lists_that_do_not_fit_are_refused(
    layers: list[int], scales: list[float], tied: bool, reason: str, tmp_path: Path
) -> None:
    new_rolled(tmp_path / "evo", layers, scales, tie_word_embeddings=tied)
    with pytest.raises(SourceError, match=reason):
        Sources.open([MODEL], tmp_path)[MODEL]
