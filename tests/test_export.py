"""An exported model is the scored model, and a normal Hugging Face folder."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from workspace import Workspace

from llmevo import export
from llmevo.bench import Bench
from llmevo.cli import settings_of
from llmevo.engines import HfEngine
from llmevo.recipe import Recipe
from llmevo.sources import Sources


@pytest.fixture
def finished(workspace: Workspace) -> Workspace:
    """A workspace with a finished run in `run`."""
    assert workspace.llmevo("run", workspace.config(), "--out", "run")[0] == 0
    return workspace


def test_the_exported_model_has_the_held_out_score_that_the_run_reported(finished: Workspace) -> None:
    status, printed = finished.llmevo("export", "run", "out")
    assert status == 0, printed
    state = finished.state("run")
    config, root = settings_of(state, Path("run"))
    bench = Bench(config, root)
    engine = HfEngine(Path("out"), Path("out"), "float32")
    assert bench.heldout is not None
    assert bench.heldout.score(engine.lm).total == state.heldout["best"].score
    assert bench.evaluator.score(engine.lm).total == (state.best.value if state.best else None)


def test_the_folder_has_everything_a_hugging_face_model_has(finished: Workspace) -> None:
    finished.llmevo("export", "run", "out")
    names = {file.name for file in Path("out").iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "best.yml",
        "mergekit_config.yml",
        "README.md",
    }
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained("out").encode("abc")


def test_the_card_names_parents_scores_and_recipe(finished: Workspace) -> None:
    finished.llmevo("export", "run", "out")
    card = Path("out/README.md").read_text()
    state = finished.state("run")
    assert "| `one` |" in card
    assert "merge_method: task_arithmetic" in card
    assert f"{state.heldout['best'].score:.3f}" in card
    assert str(finished.root) not in card


def test_best_yml_merged_by_hand_gives_the_same_weights(finished: Workspace) -> None:
    finished.llmevo("export", "run", "out")
    Path("best.yml").write_text(Path("out/best.yml").read_text())
    assert finished.llmevo("merge", "best.yml", "again")[0] == 0
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


def test_any_candidate_can_be_exported_and_an_unknown_one_is_named(finished: Workspace) -> None:
    assert finished.llmevo("export", "run", "parent", "--candidate", "0")[0] == 0
    one, parent = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("one", "parent"))
    assert all(torch.equal(one[name], parent[name]) for name in one)
    status, printed = finished.llmevo("export", "run", "other", "--candidate", "99")
    assert status == 2
    assert "0 to 8" in printed
    assert not Path("other").exists()


def test_a_folder_that_holds_something_is_not_overwritten(finished: Workspace) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    status, printed = finished.llmevo("export", "run", "out")
    assert status == 2
    assert "exists already" in printed
    assert [file.name for file in Path("out").iterdir()] == ["mine.txt"]


def test_a_full_disk_leaves_nothing_that_looks_whole(finished: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    status, printed = finished.llmevo("export", "run", "out")
    assert status == 2
    assert "No space left" in printed
    assert not [path for path in finished.root.iterdir() if "out" in path.name]


def test_large_models_are_written_in_shards_that_transformers_reads(
    finished: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished.llmevo("export", "run", "whole")
    monkeypatch.setattr(export, "SHARD_BYTES", 8_000)
    finished.llmevo("export", "run", "sharded")
    index = json.loads(Path("sharded/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    one, two = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("whole", "sharded"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_stacked_layers_change_the_depth_in_the_config(workspace: Workspace) -> None:
    text = """
merge_method: linear
slices:
  - sources: [{model: one, layer_range: [0, 2], parameters: {weight: 1.0}}]
  - sources: [{model: two, layer_range: [1, 2], parameters: {weight: 1.0}}]
"""
    export.write_model(Recipe.from_yaml(text), Sources(workspace.root), Path("deep"))
    assert json.loads(Path("deep/config.json").read_text())["num_hidden_layers"] == 3
    assert AutoModelForCausalLM.from_pretrained("deep").config.num_hidden_layers == 3
