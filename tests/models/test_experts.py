"""An expert of a mixture of experts is read as a dense model of the same function."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmevo.errors import SourceError
from llmevo.export.merge import merge
from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.checkpoints import LowRank
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from support.checkpoints import new_adapter, quietly
from support.families import new_family

TOKENS = torch.arange(5, 15).unsqueeze(0)
NAMES = {
    "Mixtral": ("block_sparse_moe", {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}),
    "Qwen3-MoE": ("mlp", {name: name for name in ("gate_proj", "up_proj", "down_proj")}),
}


def expert(folder: Path, number: int) -> ModelReference:
    return ModelReference.parse(f"{folder}#expert={number}")


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model: Any = quietly(lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    return model(TOKENS).logits


def copies(mixture: Path, number: int, out: Path, module: str) -> Path:
    """The mixture with the weights of one expert in all of them: whatever its routers do, it is that expert."""
    weights = load_file(mixture / "model.safetensors")
    start = f".{module}.experts."
    for name in weights:
        if start in name:
            before, _, after = name.partition(start)
            weights[name] = weights[f"{before}{start}{number}.{after.partition('.')[2]}"].clone()
    out.mkdir()
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    config = json.loads((mixture / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | ({"norm_topk_prob": True} if module == "mlp" else {})))
    return out


@pytest.mark.parametrize("family", NAMES)
def test_an_expert_is_the_dense_model_that_a_mixture_of_its_copies_is(family: str, tmp_path: Path) -> None:
    mixture, (module, names) = new_family(tmp_path, family) / "base", NAMES[family]
    one = expert(mixture, 2)
    sources = Sources.open([one])
    write_model(Recipe.of_one(one), sources, tmp_path / "dense")
    written, weights = load_file(tmp_path / "dense" / "model.safetensors"), load_file(mixture / "model.safetensors")
    for projection, stored in names.items():
        name = f"model.layers.1.mlp.{projection}.weight"
        assert torch.equal(written[name], weights[f"model.layers.1.{module}.experts.2.{stored}.weight"])
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["architectures"] == [{"Mixtral": "MistralForCausalLM"}.get(family, "Qwen3ForCausalLM")]
    assert not {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"} & config.keys()
    torch.testing.assert_close(
        logits(tmp_path / "dense"), logits(copies(mixture, 2, tmp_path / "copies", module)), rtol=1e-4, atol=1e-5
    )
    assert [*sources.left_out(one).values()] == ["the router of a mixture, which one expert does not need"] * 2


@pytest.mark.parametrize("family", NAMES)
def test_experts_in_one_tensor_are_read_as_those_in_tensors_of_their_own(family: str, tmp_path: Path) -> None:
    mixture, (module, names) = new_family(tmp_path, family) / "base", NAMES[family]
    weights = load_file(mixture / "model.safetensors")
    plain = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for layer in range(2):
        start = f"model.layers.{layer}.{module}.experts."
        parts = {name: [weights[f"{start}{e}.{stored}.weight"] for e in range(4)] for name, stored in names.items()}
        both = [torch.cat(pair) for pair in zip(parts["gate_proj"], parts["up_proj"], strict=True)]
        plain |= {f"{start}gate_up_proj": torch.stack(both), f"{start}down_proj": torch.stack(parts["down_proj"])}
    fused = tmp_path / "fused"
    fused.mkdir()
    save_file(plain, fused / "model.safetensors", {"format": "pt"})
    (fused / "config.json").write_bytes((mixture / "config.json").read_bytes())
    sources = Sources()
    apart, together = sources[expert(mixture, 3)], sources[expert(fused, 3)]
    assert apart.shapes == together.shapes
    assert all(torch.equal(apart.tensor(name), together.tensor(name)) for name in apart.shapes)
    assert apart.dtype("model.layers.0.mlp.up_proj.weight") == together.dtype("model.layers.0.mlp.up_proj.weight")


def test_an_expert_before_a_llama_is_a_llama_too(tmp_path: Path) -> None:
    mixture, llama = new_family(tmp_path / "m", "Mixtral") / "base", new_family(tmp_path / "l", "Llama") / "base"
    one, other = expert(mixture, 0), ModelReference.parse(str(llama))
    assert Sources.open([one, other]).config(one)["architectures"] == ["LlamaForCausalLM"]
    assert Sources.open([one]).config(one)["architectures"] == ["MistralForCausalLM"]


def test_experts_of_a_mixtral_merge_with_a_llama(tmp_path: Path) -> None:
    mixture, llama = new_family(tmp_path / "m", "Mixtral") / "base", new_family(tmp_path / "l", "Llama") / "base"
    one, two, base = expert(mixture, 0), expert(mixture, 1), ModelReference.parse(str(llama))
    models = [{"model": str(of), "parameters": {"weight": 0.5}} for of in (one, two)]
    recipe = Recipe.model_validate({"merge_method": "task_arithmetic", "base_model": str(base), "models": models})
    sources = Sources.open(recipe.references)
    merged = dict(Merger(sources).merge(recipe))
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(merged[name], (sources[one].tensor(name) + sources[two].tensor(name)) / 2)
    assert sources.own_config(one)["model_type"] == "llama"


def test_an_adapter_can_be_on_an_expert(tmp_path: Path) -> None:
    mixture, name = new_family(tmp_path, "Mixtral") / "base", "model.layers.1.mlp.down_proj.weight"
    new_family(tmp_path / "llama", "Llama")
    new_adapter(tmp_path / "adapter", tmp_path / "llama" / "base")
    sources = Sources()
    adapted = ModelReference.parse(f"{mixture}#expert=1+{tmp_path / 'adapter'}")
    weight = sources[adapted].weight(name)
    assert isinstance(weight, LowRank)
    assert torch.equal(weight.origin, sources[expert(mixture, 1)].tensor(name))
    assert adapted.name == "adapter"


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_a_model_that_became_an_expert_is_read_back(family: str, tmp_path: Path) -> None:
    dense = new_family(tmp_path, family)
    given = {
        "merge_method": "linear",
        "models": [{"model": str(dense / "base"), "parameters": {"weight": 1.0}}],
        "mixture": {"experts": [str(dense / "two"), str(dense / "two")]},
    }
    merge(Recipe.model_validate(given), tmp_path / "mixture")
    sources = Sources()
    two = sources[expert(tmp_path / "mixture", 1)]
    for name in two.shapes:
        whole = dense / ("two" if ".mlp." in name else "base")
        assert torch.equal(two.tensor(name), sources[ModelReference.parse(str(whole))].tensor(name)), name


def test_each_expert_has_a_checksum_and_a_name_of_its_own(tmp_path: Path) -> None:
    mixture = new_family(tmp_path, "Mixtral") / "base"
    sources, experts = Sources(), [expert(mixture, place) for place in range(4)]
    assert len({sources.checksum(of) for of in experts}) == 4
    assert [of.name for of in experts] == [f"base-expert{place}" for place in range(4)]
    assert [ModelReference.parse(str(of)) for of in experts] == experts


def test_a_checksum_follows_the_weights_of_the_mixture(tmp_path: Path) -> None:
    mixture = new_family(tmp_path, "Mixtral") / "base"
    before = Sources().checksum(expert(mixture, 1))
    new_family(tmp_path, "Mixtral", seed=9)
    assert Sources().checksum(expert(mixture, 1)) != before


@pytest.mark.parametrize(
    ("family", "number", "message"),
    [
        ("Mixtral", 9, "the mixture has 4 experts, #expert=0 to #expert=3"),
        ("Llama", 0, "the model is dense (its config.json names no experts); leave out #expert="),
        ("Qwen2-MoE", 0, "each of its layers has a shared expert behind a gate of its own"),
        ("OLMoE", 0, "no dense class has its attention and norms; llmevo reads experts of mixtral and qwen3_moe"),
    ],
)
def test_an_expert_that_is_no_dense_model_is_refused(family: str, number: int, message: str, tmp_path: Path) -> None:
    reference = expert(new_family(tmp_path, family) / "base", number)
    with pytest.raises(SourceError) as refused:
        Sources.open([reference])
    assert message in str(refused.value)
    assert str(reference) in str(refused.value)


def test_layers_of_another_size_than_an_expert_are_refused(tmp_path: Path) -> None:
    mixture = new_family(tmp_path, "Qwen3-MoE", mlp_only_layers=[0]) / "base"
    with pytest.raises(SourceError, match="its layers without experts have 96 neurons, an expert 32"):
        Sources.open([expert(mixture, 0)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/b#expert=", "#expert= needs the number of an expert, from 0"),
        ("a/b#expert=x", "#expert= needs the number of an expert, from 0"),
        ("a/b+c#expert=1", r"write MODEL#expert=1\+ADAPTER, the expert first"),
    ],
)
def test_a_reference_without_a_number_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelReference.parse(text)
