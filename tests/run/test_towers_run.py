"""Searches over a mixture of experts, and over the text tower of a vision-language model."""

import json
import shutil
from typing import Any

import pytest
import torch

from llmevo.run.log import events
from support.checkpoints import weights_of
from support.families import MODELS, new_family
from support.tiny_model import tiny_tokenizer
from support.workspace import Workspace

SEARCH = {"optimizer": "cma-es", "budget": 8, "population": 3, "seed": 3}


def replace(workspace: Workspace, family: str, **changes: Any) -> None:
    """Put the models of a family in the place of the workspace's."""
    for model in MODELS:
        shutil.rmtree(workspace.root / model, ignore_errors=True)
    new_family(workspace.root, family, **changes)


def genome(**keys: object) -> dict[str, object]:
    return {
        "base_model": "base",
        "models": ["one", "two"],
        "merge_method": "task_arithmetic",
        "dtype": "float32",
        **keys,
    }


def test_a_search_over_a_mixture_of_experts_keeps_the_routers_and_says_so(workspace: Workspace) -> None:
    replace(workspace, "Qwen3-MoE")
    config = workspace.config(genome=genome(), search=SEARCH)
    status, printed = workspace.llmevo("inspect", config)
    printed = " ".join(printed.split())
    assert status == 0, printed
    assert "2 copied, the weight of every model is 0: model.layers.0.mlp.gate.weight" in printed
    assert "The routers (mlp.gate.) are those of the base with task_arithmetic" in printed
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    (started,) = (event for event in workspace.events("run") if isinstance(event, events.RunStarted))
    assert started.routers == ["mlp.gate."]
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0
    state = workspace.state("run")
    mixed = next(trial for trial in state.trials.values() if trial.candidate.origin == "uniform")
    status, printed = workspace.llmevo("export", "run", "out", "--candidate", mixed.candidate.id)
    assert status == 0, printed
    name = "model.layers.1.mlp.gate.weight"
    assert torch.equal(weights_of(workspace.root / "out")[name], weights_of(workspace.root / "base")[name])


def test_a_filter_of_the_users_is_a_gene_of_the_routers(workspace: Workspace) -> None:
    replace(workspace, "Qwen3-MoE")
    status, printed = workspace.llmevo("inspect", workspace.config(genome=genome(filters=["mlp.gate."])), "--json")
    assert status == 0, printed
    found = json.loads(printed)
    assert found["tensors"]["copied"] == {}
    assert {gene["name"] for gene in found["genes"]} >= {"one/all/mlp.gate./weight", "two/all/mlp.gate./weight"}


@pytest.mark.parametrize("method", ["task_arithmetic", "sce"])
def test_a_search_merges_a_language_model_into_a_vision_language_model(method: str, workspace: Workspace) -> None:
    replace(workspace, "Qwen2", hidden_size=128, head_dim=None)
    shutil.rmtree(workspace.root / "base")
    vision = new_family(workspace.root / "vision", "Qwen2.5-VL")
    (vision / "base").rename(workspace.root / "base")
    (workspace.root / "base" / "preprocessor_config.json").write_text("{}")
    tiny_tokenizer().save_pretrained(workspace.root / "base")
    config = workspace.config(genome=genome(merge_method=method), search=SEARCH | {"budget": 6})
    status, printed = workspace.llmevo("inspect", config)
    assert status == 0, printed
    assert "copied, only in base: visual: visual." in " ".join(printed.split())
    status, printed = workspace.llmevo("run", config, "--out", "run")
    assert status == 0, printed
    assert not [event for event in workspace.events("run") if isinstance(event, events.Failed)]
    for trial in [*workspace.state("run").trials.values()][:3]:  # with methods without weights, parents alone as well
        out = f"out{trial.candidate.id}"
        status, printed = workspace.llmevo("export", "run", out, "--candidate", trial.candidate.id)
        assert status == 0, printed
        exported, base = weights_of(workspace.root / out), weights_of(workspace.root / "base")
        assert exported.keys() == base.keys()
        assert all(torch.equal(exported[name], of) for name, of in base.items() if name.startswith("visual."))
        assert json.loads((workspace.root / out / "config.json").read_text())["model_type"] == "qwen2_5_vl"
        assert (workspace.root / out / "preprocessor_config.json").exists()
