"""Every family of decoders: its merge, and swaps in the transformers engine against the exported model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmevo.engines.hf import HfEngine
from llmevo.errors import CandidateError
from llmevo.merging.merger import Merger, merge
from llmevo.merging.writer import write_model
from llmevo.models.checkpoints import Checkpoint
from llmevo.models.conversion import Part, Places
from llmevo.models.sources import Sources
from support.families import DENSE, FAMILIES, new_family, new_model
from support.family_checks import (
    LIMIT,
    METHODS,
    check_swaps,
    check_vllm,
    far_from_float64,
    loaded,
    logits_of,
    recipe_of,
)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_merges_as_in_float64_and_swaps_as_exported(name: str, tmp_path: Path) -> None:
    root = new_family(tmp_path, name)
    for method in METHODS:
        assert far_from_float64(root, method) <= LIMIT
    # In bfloat16 transformers keeps some weights of hybrids and of mixtures of experts in float32.
    check_swaps(root, root, torch.float32 if FAMILIES[name].kind == DENSE else torch.bfloat16)


@pytest.mark.vllm
@pytest.mark.parametrize("name", ["GPT-2", "Granite 4 (hybrid)", "Qwen3-MoE"])
def test_a_kind_of_families_swaps_in_vllm_as_exported(name: str, tmp_path: Path) -> None:
    check_vllm(new_family(tmp_path, name), tmp_path, "bfloat16")


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    return new_family(tmp_path, "Qwen3-MoE")


def engine_of(root: Path) -> HfEngine:
    return HfEngine(root / "base", root / "base", "float32", "cpu", Merger(Sources(root), 0))


def one_expert(weight: float) -> Any:
    """A merge in which only one tensor of one expert differs from that of another weight."""
    filters = [{"filter": "layers.1.mlp.experts.2.up_proj", "value": weight}, {"value": 0.3}]
    return recipe_of("linear", (filters, 0.9), dtype="float32")


@pytest.mark.parametrize("sliced", [True, False])
def test_one_experts_tensor_changes_and_no_other(sliced: bool, experts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not sliced:
        monkeypatch.setattr(Part, "slices", lambda *_: {})
    engine = engine_of(experts)
    engine.swap(one_expert(0.3))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    before = {key: weight.clone() for key, weight in engine.model.state_dict().items()}
    engine.swap(one_expert(2.0))
    after = engine.model.state_dict()
    assert [key for key in after if not torch.equal(after[key], before[key])] == [name]
    changed = (after[name] != before[name]).any(-1)
    half = changed.shape[1] // 2
    assert changed[2, half:].all()
    assert int(changed.sum()) == half
    merged = dict(merge(one_expert(2.0), Sources(experts)))
    assert torch.equal(after[name][2, half:], merged["model.layers.1.mlp.experts.2.up_proj.weight"])


@pytest.mark.parametrize("sliced", [True, False])
def test_a_swap_that_fails_among_experts_is_replaced_as_a_whole_by_the_next(
    sliced: bool, experts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not sliced:
        monkeypatch.setattr(Part, "slices", lambda *_: {})
    engine, whole = engine_of(experts), engine_of(experts)
    engine.swap(one_expert(0.3))
    merger: Any = engine.merger
    original: Callable[..., Any] = merger.merge

    def torn(*given: Any) -> Any:
        for name, weight in original(*given):
            if name == "model.layers.1.mlp.experts.1.gate_proj.weight":
                raise CandidateError("the merged weight is not finite")
            yield name, weight

    monkeypatch.setattr(merger, "merge", torn)
    with pytest.raises(CandidateError, match="not finite"):
        engine.swap(recipe_of("linear", (0.9, 0.1), dtype="float32"))
    monkeypatch.setattr(merger, "merge", original)
    for recipe in (one_expert(2.0), one_expert(0.3)):
        engine.swap(recipe)
        whole.swap(recipe)
        assert torch.equal(logits_of(engine.model), logits_of(whole.model))


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-Next", "Jamba", "DeepSeek-V3", "PhiMoE"])
def test_slices_of_experts_are_where_transformers_puts_them(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(new_family(tmp_path, name) / "one")
    model = new_model(name)
    places = Places(model, checkpoint.shapes)
    parts = {part.target: part for part in places.parts.values() if len(part.names) > 1}
    assert parts
    assert not places.together()
    for part in parts.values():
        tensors = {key: checkpoint.tensor(key) for key in part.names}
        whole: Tensor = part.convert(tensors, model)[part.target]
        assert all(torch.equal(view, tensors[key]) for key, view in part.slices(whole).items())


def test_a_tied_head_that_a_merge_makes_differ_is_scored_as_it_will_be_loaded(tmp_path: Path) -> None:
    root = new_family(tmp_path, "Llama, tied")
    for name in ("base", "one", "two"):
        _with_head(root / name)
    models = [{"model": name, "parameters": {"weight": 0.5, "density": 0.5}} for name in ("one", "two")]
    recipe = recipe_of("linear", merge_method="dare_linear", base_model="base", models=models, dtype="float32")
    engine = engine_of(root)
    engine.swap(recipe)
    write_model(recipe, Sources(root), root / "out", trim=False)
    assert torch.equal(logits_of(engine.model), logits_of(loaded(root / "out", torch.float32)))
    assert not engine.differences(root / "out")


def _with_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
