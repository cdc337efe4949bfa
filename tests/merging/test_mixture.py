"""Mixtures of experts: exactness, mergekit-moe as the oracle, and what is refused."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmevo
from llmevo.errors import RecipeError, SourceError, UserError
from llmevo.merging.mixture.mixture import Mixture, RouterSlice
from llmevo.merging.mixture.router import Inputs, Router, fit, read
from llmevo.models.references import ModelReference
from support.checkpoints import mergekit, new_adapter, quietly, weights_of
from support.families import new_family

CLASSES = {
    "Llama": "MixtralForCausalLM",
    "Mistral": "MixtralForCausalLM",
    "Qwen3": "Qwen3MoeForCausalLM",
    "Qwen2": "Qwen2MoeForCausalLM",
}
PROMPTS = (("add two numbers", "what is 1 + 2"), ("spell a word", "the word ends with an a"))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with the base and two fine-tunes of a family, made once."""

    @cache
    def family(name: str, tied: bool = False) -> Path:
        return new_family(tmp_path_factory.mktemp("mixture"), name, tie_word_embeddings=tied)

    return family


def model_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(folder: Path) -> Tensor:
    tokens = torch.arange(4, 40).reshape(2, 18)
    with torch.no_grad():
        return model_of(folder)(tokens).logits


def recipe(root: Path, mixture: Mapping[str, Any], model: str = "one") -> llmevo.Recipe:
    """One model with a mixture in the place of its MLPs."""
    given = {"merge_method": "linear", "models": [{"model": str(root / model), "parameters": {"weight": 1.0}}]}
    return llmevo.Recipe.model_validate({**given, "dtype": "float32", "mixture": mixture})


def moe(root: Path, **changes: Any) -> dict[str, Any]:
    """A config of mergekit-moe with both fine-tunes as experts."""
    experts = [
        {"source_model": str(root / name), "positive_prompts": [*prompts]}
        for name, prompts in zip(("one", "two"), PROMPTS, strict=True)
    ]
    return {"base_model": str(root / "base"), "experts": experts, "dtype": "float32", **changes}


def merged(given: Mapping[str, Any], folder: Path) -> Path:
    """The folder of a merge of a YAML file."""
    file = folder / "moe.yml"
    file.write_text(yaml.safe_dump(given, sort_keys=False))
    llmevo.merge(file, folder / "out")
    return folder / "out"


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_mixture_of_copies_of_a_model_is_that_model(families: Any, name: str, tied: bool, tmp_path: Path) -> None:
    root = families(name, tied)
    one = str(root / "one")
    llmevo.merge(recipe(root, {"experts": [one] * 3, "experts_per_token": 2}), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == [CLASSES[name]]
    assert config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in weights_of(tmp_path / "out")) is not tied
    torch.testing.assert_close(logits(tmp_path / "out"), logits(root / "one"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_experts_are_only_in_the_chosen_layers(families: Any, name: str, tmp_path: Path) -> None:
    """Both experts with all the weight of the first, by a bias; layer 0 stays the base's own MLP."""
    root = families(name)
    hidden = model_of(root / "base").config.hidden_size
    directions = torch.zeros(2, 2, hidden)
    router = Router(directions)
    mixture = {"experts": [str(root / "two")] * 2, "layers": [[1, 2]], "router": str(router.keep())}
    llmevo.merge(recipe(root, mixture, "base"), tmp_path / "out")
    both = model_of(root / "base")
    both.model.layers[1].mlp = model_of(root / "two").model.layers[1].mlp
    both.save_pretrained(tmp_path / "expected")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "expected"), rtol=1e-4, atol=1e-4)
    if name.startswith("Qwen"):
        assert "model.layers.0.mlp.gate_proj.weight" in weights_of(tmp_path / "out")


def test_copies_of_a_merge_with_random_masks_are_alike(families: Any, tmp_path: Path) -> None:
    """In a layer without experts Mixtral has copies of the merged MLP, all with the mask of that MLP."""
    root = families("Llama")
    models = [{"model": str(root / name), "parameters": {"weight": 0.5, "density": 0.5}} for name in ("one", "two")]
    given = {"merge_method": "dare_linear", "base_model": str(root / "base"), "models": models, "dtype": "float32"}
    mixture = {"experts": [str(root / "one")] * 2, "layers": [[1, 2]]}
    llmevo.merge(llmevo.Recipe.model_validate({**given, "mixture": mixture}), tmp_path / "out")
    llmevo.merge(llmevo.Recipe.model_validate(given), tmp_path / "dense")
    merged = weights_of(tmp_path / "dense")["model.layers.0.mlp.down_proj.weight"]
    for expert in range(2):
        copy = weights_of(tmp_path / "out")[f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight"]
        assert torch.equal(copy, merged)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
@pytest.mark.parametrize("name", CLASSES)
def test_mergekit_moes_yaml_gives_its_tensors(
    families: Any, name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mergekit computes hidden states with the products of bfloat16 that PyTorch has.
    monkeypatch.setattr("llmevo.engines.half_precision.has_instructions", lambda _: True)
    root = families(name)
    given = moe(root, gate_mode=mode, experts_per_token=1)
    given["experts"][0] |= {"negative_prompts": ["spell it"], "residual_scale": 0.5}
    if name == "Qwen2":
        given["shared_experts"] = [{"source_model": str(root / "base"), "positive_prompts": ["a text"]}]
    theirs = mergekit("moe.config").MoEMergeConfig.model_validate(given)
    options = mergekit("merge").MergeOptions(copy_tokenizer=False)
    quietly(lambda: mergekit("scripts.moe").build(theirs, str(tmp_path / "theirs"), options, device="cpu"))
    out = merged(given, tmp_path)
    expected, actual = model_of(tmp_path / "theirs").state_dict(), model_of(out).state_dict()
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, actual[key]), key
    ours = model_of(out).config
    assert ours.num_experts_per_tok == 1
    torch.testing.assert_close(logits(out), logits(tmp_path / "theirs"), rtol=1e-5, atol=1e-5)


def test_an_adapter_is_an_expert(families: Any, tmp_path: Path) -> None:
    root = families("Llama")
    adapter = new_adapter(tmp_path / "adapter", root / "base", target_modules=["gate_proj", "down_proj"])
    given = moe(root)
    given["experts"][1]["source_model"] = f"{root / 'base'}+{adapter}"
    out = weights_of(merged(given, tmp_path))
    llmevo.merge(
        llmevo.Recipe.of_one(ModelReference.parse(f"{root / 'base'}+{adapter}"), "float32"), tmp_path / "alone"
    )
    alone = weights_of(tmp_path / "alone")
    assert torch.equal(
        out["model.layers.1.block_sparse_moe.experts.1.w2.weight"], alone["model.layers.1.mlp.down_proj.weight"]
    )


def test_the_gate_mode_inputs_sends_prompts_to_their_experts(families: Any, tmp_path: Path) -> None:
    """With `inputs` the routers of a mixture, run on the prompts, prefer the prompts' experts."""
    root = families("Llama")
    out = merged(moe(root, gate_mode="inputs", experts_per_token=1), tmp_path)
    model = model_of(out)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    for expert, prompts in enumerate(PROMPTS):
        for prompt in prompts:
            seen: list[Tensor] = []
            gate = model.model.layers[0].mlp.gate
            handle = gate.register_forward_hook(lambda _module, _given, made, seen=seen: seen.append(made[0]))
            with torch.no_grad():
                model(**tokenizer(prompt, return_tensors="pt"))
            handle.remove()
            assert int(seen[0].mean(0).argmax()) == expert


def test_the_folder_of_a_mixture_has_its_recipe_and_router(families: Any, tmp_path: Path) -> None:
    out = merged(moe(families("Llama")), tmp_path)
    llmevo.merge(out / "mergekit_config.yml", tmp_path / "again")
    first, second = weights_of(out), weights_of(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_row_has_temperature_and_bias() -> None:
    random = torch.Generator().manual_seed(0)
    directions, means = torch.randn(1, 2, 8, generator=random), torch.randn(1, 8, generator=random)
    given = Mixture(
        experts=[ModelReference.parse("one"), ModelReference.parse("two")],
        router="router.json",
        router_slices=[RouterSlice(layer_range=(0, 1), temperature=0.5, bias=[0.3, -0.3])],
    )
    rows = Router(directions, means).rows(given, 0)
    plain = directions[0] @ means[0]
    torch.testing.assert_close(rows @ means[0], (plain + torch.tensor([0.3, -0.3])) / 0.5)


def test_the_fit_finds_the_directions_that_made_the_scores() -> None:
    """Scores that are linear in the inputs are predicted; the logits have a standard deviation of 1."""
    random = torch.Generator().manual_seed(0)
    truth = torch.randn(3, 8, generator=random, dtype=torch.float64)
    truth -= truth.mean(0)
    inputs = torch.randn(400, 8, generator=random, dtype=torch.float64)
    given = Inputs(inputs.T @ inputs, inputs, torch.ones(400).double())
    found = fit([given], inputs @ truth.T, ridge=1e-6).directions[0].double()
    cosine = torch.nn.functional.cosine_similarity(found, truth)
    assert float(cosine.min()) > 0.999
    assert float((inputs @ found.T).square().mean()) == pytest.approx(1.0, abs=1e-3)


def test_a_routers_file_keeps_its_bits(tmp_path: Path) -> None:
    router = Router(torch.randn(2, 3, 4), torch.randn(2, 4))
    (tmp_path / "router.json").write_text(router.to_json())
    again = read(tmp_path / "router.json")
    assert torch.equal(router.directions, again.directions)
    assert again.means is not None
    assert router.means is not None
    assert torch.equal(router.means, again.means)
    (tmp_path / "router.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "router.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 3}, "experts_per_token is 3; give a number from 1 to 2"),
        ({"gate_mode": "hiden"}, "gate_mode"),
        ({"gate_modes": "hidden"}, "gate_modes: llmevo does not know this key, did you mean 'gate_mode'"),
        ({"architecture": "qwen"}, "does not fit model_type 'llama'"),
        ({"architecture": "other"}, "architecture 'other' is unknown"),
        ({"shared_experts": [{"source_model": "BASE", "positive_prompts": ["a"]}]}, "has no shared expert"),
    ],
)
def test_a_wrong_key_is_one_clear_line(families: Any, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    root = families("Llama")
    given = json.loads(json.dumps(moe(root, **changes)).replace("BASE", str(root / "base")))
    with pytest.raises(UserError, match=message) as caught:
        merged(given, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_experts_without_prompts_are_refused(families: Any, tmp_path: Path) -> None:
    given = moe(families("Llama"))
    del given["experts"][1]["positive_prompts"]
    with pytest.raises(RecipeError, match=r"experts\.1: it has no positive_prompts"):
        merged(given, tmp_path)
    given["experts"][1]["positive_prompts"] = given["experts"][0]["positive_prompts"]
    with pytest.raises(RecipeError, match="all have the same prompts"):
        merged(given, tmp_path)
    given["gate_mode"] = "random"
    assert merged(given, tmp_path).exists()


def test_experts_of_other_shapes_are_refused(families: Any, tmp_path: Path) -> None:
    given = moe(families("Llama"))
    wide = new_family(tmp_path / "wide", "Llama", intermediate_size=128)
    given["experts"][1]["source_model"] = str(wide / "one")
    with pytest.raises(SourceError, match="intermediate_size"):
        merged(given, tmp_path)


def test_experts_with_another_head_are_refused(families: Any, tmp_path: Path) -> None:
    """A base with tied embeddings and an expert with a head of its own: the mixture could have only one of them."""
    given = moe(families("Llama", True))
    given["experts"][1]["source_model"] = str(families("Llama") / "two")
    with pytest.raises(SourceError, match="lm_head"):
        merged(given, tmp_path)


def test_a_base_without_a_class_of_mixtures_is_refused(families: Any, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no class of mixtures fits model_type 'gemma3_text'"):
        merged(moe(families("Gemma 3 (text)")), tmp_path)


@pytest.mark.parametrize(
    "changes", [{"layers": [[0, 3]]}, {"router_slices": [{"layer_range": [2, 4], "temperature": 0.5}]}]
)
def test_layers_outside_the_models_are_refused(families: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    root = families("Llama")
    with pytest.raises(RecipeError, match=r"mixture: layers \[.*\] are outside .* 2 layers"):
        llmevo.merge(recipe(root, {"experts": [str(root / "one")] * 2, **changes}), tmp_path / "out")


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"experts": ["one", "two"]}, "the router is missing"),
        ({"experts": ["one", "one"], "experts_per_token": 3}, "experts_per_token is 3, more than the 2 experts"),
        ({"experts": ["one"] * 2, "router_slices": [{"layer_range": [0, 2], "bias": [1.0]}]}, "1 bias for 2 experts"),
        ({"experts": ["one"] * 2, "layers": [[2, 1]]}, "layers"),
        ({"expert": ["one"]}, "expert"),
    ],
)
def test_a_wrong_mixture_of_a_recipe_is_one_clear_line(mixture: Mapping[str, Any], message: str) -> None:
    given = {"merge_method": "linear", "models": [{"model": "one", "parameters": {"weight": 1.0}}], "mixture": mixture}
    with pytest.raises(RecipeError, match=message) as caught:
        llmevo.Recipe.from_yaml(yaml.safe_dump(given))
    assert "\n" not in str(caught.value)
