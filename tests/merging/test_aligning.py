"""The neurons of models that do not share an order are put into that of the base."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmevo.errors import RecipeError
from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.models.sources import Sources
from support.checkpoints import new_checkpoint, weights_of
from support.families import new_family


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(tmp_path / "cache"))


def shuffled(model: Path, out: Path, noise: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Save a fine-tune of a model with its neurons in another order; return its weights before and after that."""
    random = torch.Generator().manual_seed(7)
    weights = load_file(model / "model.safetensors")
    tuned = {name: w + noise * w.std() * torch.randn(w.shape, generator=random) for name, w in weights.items()}
    moved = dict(tuned)
    for layer in range(4):
        start = f"model.layers.{layer}.mlp."
        order = torch.randperm(32, generator=random)
        for name in ("gate_proj", "up_proj"):
            moved[f"{start}{name}.weight"] = tuned[f"{start}{name}.weight"][order].clone()
        moved[f"{start}down_proj.weight"] = tuned[f"{start}down_proj.weight"][:, order].clone()
    out.mkdir()
    save_file(moved, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_bytes((model / "config.json").read_bytes())
    return tuned, moved


def recipe(*models: str, prepare: bool = True, base: str = "base") -> Recipe:
    each = [{"model": name, "parameters": {"weight": 0.5}} for name in models]
    given = {"merge_method": "task_arithmetic", "base_model": base, "models": each}
    return Recipe.model_validate({**given, **({"prepare": ["align"]} if prepare else {})})


def test_neurons_are_put_into_the_order_of_the_base(tmp_path: Path) -> None:
    new_checkpoint(tmp_path / "base")
    tuned, moved = shuffled(tmp_path / "base", tmp_path / "moved", 0.2)
    merger = Merger(Sources(tmp_path))
    merged = dict(merger.merge(recipe("moved")))
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert not torch.equal(tuned["model.layers.1.mlp.up_proj.weight"], moved["model.layers.1.mlp.up_proj.weight"])
    for name, weight in merged.items():
        torch.testing.assert_close(weight, (base[name] + tuned[name]) / 2)
    prepared = merger.prepared(recipe("moved"))
    assert prepared
    for name in tuned:
        aligned = prepared.weight(prepared.experts[0], name)
        assert isinstance(aligned, Tensor)
        assert torch.equal(aligned, tuned[name])


def test_a_model_in_the_order_of_the_base_stays_as_it_is(tmp_path: Path) -> None:
    new_checkpoint(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "tuned").mkdir()
    save_file({name: 1.01 * weight for name, weight in weights.items()}, tmp_path / "tuned" / "model.safetensors")
    (tmp_path / "tuned" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    prepared = Merger(Sources(tmp_path)).prepared(recipe("tuned"))
    assert prepared
    prepared.make()
    assert not weights_of(prepared.folder)


def test_experts_of_a_mixture_are_aligned(tmp_path: Path) -> None:
    new_family(tmp_path, "Mixtral")
    of = recipe("base#expert=1", base="base#expert=0")
    sources = Sources(tmp_path)
    prepared = Merger(sources).prepared(of)
    assert prepared
    (expert,) = prepared.experts
    name = "model.layers.0.mlp.down_proj.weight"
    plain, aligned = sources[expert].tensor(name), prepared.weight(expert, name)
    assert isinstance(aligned, Tensor)
    assert not torch.equal(plain, aligned)
    assert sorted(plain.sum(0).tolist()) == pytest.approx(sorted(aligned.sum(0).tolist()), abs=1e-5)


def test_an_mlp_with_a_norm_of_its_neurons_is_refused(tmp_path: Path) -> None:
    new_family(tmp_path, "Llama")
    for model in ("base", "one"):
        weights = load_file(tmp_path / model / "model.safetensors")
        weights["model.layers.1.mlp.ffn_sub_norm.weight"] = torch.ones(96)  # as in BitNet
        save_file(weights, tmp_path / model / "model.safetensors", {"format": "pt"})
    prepared = Merger(Sources(tmp_path)).prepared(recipe("one"))
    assert prepared
    with pytest.raises(RecipeError, match=r"align cannot order the neurons of model\.layers\.1\.mlp\.ffn_sub_norm"):
        prepared.make()


@pytest.mark.parametrize("family", ["Phi-3", "GLM-4", "Nemotron"])
def test_gate_and_up_projection_may_be_one_matrix_and_the_gate_missing(tmp_path: Path, family: str) -> None:
    new_family(tmp_path, family)
    tuned = load_file(tmp_path / "one" / "model.safetensors")
    moved, order = dict(tuned), torch.randperm(96, generator=torch.Generator().manual_seed(7))
    for name, weight in tuned.items():
        if name.endswith((".mlp.up_proj.weight", ".mlp.gate_up_proj.weight")):
            moved[name] = torch.cat([part[order] for part in weight.split(96)])
        elif name.endswith(".mlp.down_proj.weight"):
            moved[name] = weight[:, order].clone()
    assert sum(not torch.equal(moved[name], tuned[name]) for name in tuned) == 4
    save_file(moved, tmp_path / "one" / "model.safetensors", {"format": "pt"})
    prepared = Merger(Sources(tmp_path)).prepared(recipe("one"))
    assert prepared
    for name, weight in tuned.items():
        aligned = prepared.weight(prepared.experts[0], name)
        assert isinstance(aligned, Tensor)
        assert torch.equal(aligned, weight)


@pytest.mark.parametrize("family", ["GPT-2", "Phi", "Mixtral"])
def test_a_model_without_such_matrices_is_refused(tmp_path: Path, family: str) -> None:
    new_family(tmp_path, family)
    with pytest.raises(
        RecipeError, match="align orders the neurons of gate_proj, up_proj and down_proj; base has none"
    ):
        dict(Merger(Sources(tmp_path)).merge(recipe("one")))


def test_it_is_the_first_step() -> None:
    with pytest.raises(RecipeError, match="align is the first step"):
        Recipe.from_yaml("merge_method: ties\nbase_model: a\nmodels: [{model: b}]\nprepare: [wudi, align]")
