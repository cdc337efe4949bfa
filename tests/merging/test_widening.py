"""Static widening is a mixture whose routers always say the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmevo.errors import RecipeError, UserError
from llmevo.export.merge import merge
from llmevo.merging.recipe import Recipe
from llmevo.search.genome import Genome
from support.checkpoints import new_checkpoint, quietly
from support.families import new_family

TOKENS = torch.arange(5, 15).unsqueeze(0)
SHARES = {0: {3: 0.6, 1: 0.4}, 1: {0: 0.25, 2: 0.75}}
"""{layer: {expert: its share}}."""


def widening(mixture: Path, shares: dict[int, dict[int, float]], **more: Any) -> Recipe:
    """A slice for each layer, with its own experts."""
    return Recipe.model_validate(
        {
            "merge_method": "widen",
            "slices": [
                {
                    "sources": [
                        {
                            "model": f"{mixture}#expert={expert}",
                            "layer_range": [layer, layer + 1],
                            "parameters": {"weight": 2 * share},
                        }
                        for expert, share in own.items()
                    ]
                }
                for layer, own in shares.items()
            ],
            **more,
        }
    )


@torch.no_grad()
def logits(folder: Path, shares: dict[int, dict[int, float]] | None = None, scale: float = 1.0) -> Tensor:
    """Of a model; with `shares` of a mixture whose routers say these, whatever they read."""
    model: Any = quietly(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    for layer, own in (shares or {}).items():

        def say(_: Any, given: Any, __: Any, own: dict[int, float] = own) -> tuple[Tensor, Tensor, Tensor]:
            rows = given[0].reshape(-1, given[0].shape[-1]).shape[0]
            said = torch.tensor([[scale * share for share in own.values()]]).expand(rows, -1)
            return said, said, torch.tensor([[*own]]).expand(rows, -1)

        model.model.layers[layer].mlp.gate.register_forward_hook(say)
    return model(TOKENS).logits


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE"])
def test_it_computes_what_static_routing_does(family: str, scale: float, tmp_path: Path) -> None:
    mixture = new_family(tmp_path, family) / "base"
    out, given = tmp_path / "wide", {"parameters": {"scale": scale}} if scale != 1.0 else {}
    merge(widening(mixture, SHARES, **given), out)
    torch.testing.assert_close(logits(out), logits(mixture, SHARES, scale), rtol=1e-4, atol=1e-5)
    one = json.loads((mixture / "config.json").read_text())
    size = one["moe_intermediate_size"] if "Qwen" in family else one["intermediate_size"]
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 2 * size


def test_its_weights_are_those_of_the_experts(tmp_path: Path) -> None:
    mixture, out = new_family(tmp_path, "Mixtral") / "base", tmp_path / "wide"
    recipe = widening(mixture, SHARES)
    merge(recipe, out)
    wide, stored = load_file(out / "model.safetensors"), load_file(mixture / "model.safetensors")
    start = "model.layers.0.block_sparse_moe.experts"
    up = torch.cat([stored[f"{start}.{expert}.w3.weight"] for expert in SHARES[0]])
    down = torch.cat([stored[f"{start}.{e}.w2.weight"] * share for e, share in SHARES[0].items()], dim=1)
    assert torch.equal(wide["model.layers.0.mlp.up_proj.weight"], up)
    torch.testing.assert_close(wide["model.layers.0.mlp.down_proj.weight"], down)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(wide[name], stored[name])
    assert Recipe.from_yaml((out / "mergekit_config.yml").read_text()) == recipe


def test_models_that_are_no_experts_are_widened_too(tmp_path: Path) -> None:
    folders = [new_checkpoint(tmp_path / str(seed), seed) for seed in range(3)]
    models = [
        {"model": str(of), "parameters": {"weight": weight}} for of, weight in zip(folders, (3, 1, 0), strict=True)
    ]
    merge(Recipe.model_validate({"merge_method": "widen", "models": models}), tmp_path / "wide")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    one, two, _ = (load_file(folder / "model.safetensors") for folder in folders)
    name = "model.layers.2.self_attn.q_proj.weight"
    torch.testing.assert_close(wide[name], 0.75 * one[name] + 0.25 * two[name])
    assert wide["model.layers.2.mlp.down_proj.weight"].shape == (16, 96)
    assert wide["model.layers.2.mlp.down_proj.weight"][:, 64:].count_nonzero() == 0


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({0: {0: 1.0}, 1: {0: 0.5, 1: 0.5}}, "name as many models in every slice"),
        ({0: {0: 0.5, 1: 0.5}, 1: {0: 0.0, 1: 0.0}}, "give weights of 0 or more, not all 0"),
        ({0: {0: 1.5, 1: -0.5}, 1: {0: 0.5, 1: 0.5}}, "give weights of 0 or more, not all 0"),
        ({0: {0: 0.5, 1: 0.5}}, "give each layer once"),
    ],
)
def test_a_recipe_without_a_wide_model_is_refused(
    shares: dict[int, dict[int, float]], message: str, tmp_path: Path
) -> None:
    mixture = new_family(tmp_path, "Mixtral") / "base"
    with pytest.raises(RecipeError, match=message):
        merge(widening(mixture, shares), tmp_path / "wide")
    assert not (tmp_path / "wide").exists()


def test_a_mixture_itself_is_refused(tmp_path: Path) -> None:
    new_family(tmp_path, "Mixtral")
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in ("one", "two")]
    with pytest.raises(RecipeError, match="write experts of a mixture as MODEL#expert=0"):
        merge(Recipe.model_validate({"merge_method": "widen", "models": models}), tmp_path / "wide")


def test_a_widened_model_is_no_mixture(tmp_path: Path) -> None:
    mixture = new_family(tmp_path, "Mixtral") / "base"
    one, two = (f"{mixture}#expert={place}" for place in range(2))
    models = [{"model": of, "parameters": {"weight": 0.5}} for of in (one, two)]
    given = {"merge_method": "widen", "models": models, "mixture": {"experts": [one, one]}}
    with pytest.raises(RecipeError, match="its experts are models of one size"):
        merge(Recipe.model_validate(given), tmp_path / "wide")


def test_an_adapter_cannot_hold_a_wide_model(tmp_path: Path) -> None:
    mixture = new_family(tmp_path, "Mixtral") / "base"
    with pytest.raises(UserError, match="has more neurons than its base; write it whole"):
        merge(widening(mixture, SHARES), tmp_path / "wide", as_="lora")


def test_a_search_and_a_single_slice_do_not_widen() -> None:
    with pytest.raises(ValueError, match="merge it with `llmevo merge`"):
        Genome.model_validate({"models": ["a", "b"], "merge_method": "widen"})
    source = {"model": "a", "layer_range": [0, 1], "parameters": {"weight": 1.0}}
    text = json.dumps({"merge_method": "by_slice", "slices": [{"merge_method": "widen", "sources": [source]}]})
    with pytest.raises(RecipeError, match="'widen' is for a whole recipe"):
        Recipe.from_yaml(text)
