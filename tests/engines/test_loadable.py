"""A model that the engine cannot run is refused before anything is computed, by `inspect` and `run` alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from llmevo.engines.checks import check_engine, check_loadable
from llmevo.errors import EngineError, SourceError
from llmevo.merging.recipe import Recipe
from llmevo.models.checkpoints import Checkpoint
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from support.checkpoints import quietly
from support.families import new_family
from support.tiny_model import tiny_tokenizer
from support.workspace import Workspace

RECIPE = """\
merge_method: linear
models:
  - {model: one, parameters: {weight: 0.5}}
  - {model: two, parameters: {weight: 0.5}}
"""


def replaced(workspace: Workspace, make: Callable[[], Any]) -> None:
    """Let all models of the workspace be such models."""
    for name in ("base", "one", "two"):
        for file in (workspace.root / name).iterdir():
            file.unlink()
        quietly(lambda name=name: make().save_pretrained(workspace.root / name))
        tiny_tokenizer().save_pretrained(workspace.root / name)


def changed(folder: Path, **values: Any) -> None:
    """Change keys of a model's config."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(workspace: Workspace, *said: str) -> None:
    """Both commands end with one error that says so, and no run begins."""
    config = workspace.config(search={"optimizer": "cma-es", "budget": 8}, llm=None, engine={"backend": "hf"})
    for command in (("inspect", config), ("run", config, "--out", "run"), ("run", config, "--dry-run")):
        status, printed = workspace.llmevo(*command)
        assert status == 2, printed
        assert "Traceback" not in printed
        assert sum(line.startswith("Error: ") for line in printed.splitlines()) == 1
        for part in said:
            assert part in printed
    assert not (workspace.root / "run").exists()


def test_a_weight_that_transformers_does_not_use_is_refused_by_the_engine_that_would_not_score_it(
    workspace: Workspace,
) -> None:
    for name in ("base", "one", "two"):
        file = workspace.root / name / "model.safetensors"
        save_file({**load_file(file), "model.layers.0.extra.weight": torch.ones(4)}, file, {"format": "pt"})
    refused(workspace, "does not use all weights", "model.layers.0.extra.weight", "engine.backend: vllm")
    folder = workspace.root / "base"
    check_loadable(folder, Checkpoint(folder).shapes, in_place=False)  # vLLM takes the checkpoint's names


def test_an_expert_that_the_checkpoint_lacks_is_refused_by_name(tmp_path: Path) -> None:
    folder = new_family(tmp_path, "Qwen3-MoE") / "base"
    shapes = dict(Checkpoint(folder).shapes)
    check_loadable(folder, shapes)
    del shapes["model.layers.1.mlp.experts.3.up_proj.weight"]
    with pytest.raises(
        SourceError, match=r"layers\.1\.mlp\.experts\..* make no model\.layers\.1\.mlp\.experts\.gate_up"
    ):
        check_loadable(folder, shapes)


def test_masks_of_old_checkpoints_and_names_without_their_prefix_are_no_obstacle(tmp_path: Path) -> None:
    folder = new_family(tmp_path, "GPT-2") / "base"
    shapes = {name.removeprefix("transformer."): shape for name, shape in Checkpoint(folder).shapes.items()}
    check_loadable(folder, {**shapes, "h.0.attn.bias": (1, 1, 64, 64), "h.0.attn.masked_bias": ()})


def test_weights_that_all_models_lack_are_refused(workspace: Workspace) -> None:
    lost = "model.layers.1.mlp.up_proj.weight"
    for name in ("base", "one", "two"):
        file = workspace.root / name / "model.safetensors"
        save_file({key: of for key, of in load_file(file).items() if key != lost}, file, {"format": "pt"})
    refused(workspace, f"lacks 1 of the weights of LlamaForCausalLM, the first is {lost}")


def test_an_encoder_decoder_model_is_refused_with_its_type(workspace: Workspace) -> None:
    size: dict[str, Any] = {"vocab_size": 98, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    replaced(workspace, lambda: T5ForConditionalGeneration(T5Config(**size)))
    refused(workspace, "t5 is an encoder-decoder model", "decoder-only")
    (workspace.root / "recipe.yml").write_text(RECIPE)
    status, printed = workspace.llmevo("merge", "recipe.yml", "out")
    assert status == 2, printed
    assert "encoder-decoder" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_layers": 4}, ["num_hidden_layers: 4", "no weight belongs to layer 2"]),
        ({"num_hidden_layers": 1}, ["num_hidden_layers: 1", "there are weights of layer 1"]),
        ({"vocab_size": 200}, ["vocab_size: 200", "model.embed_tokens.weight is (200, 32)", "it is (100, 32)"]),
        ({"num_key_value_heads": 4}, ["num_key_value_heads: 4", "k_proj.weight is (32, 32)", "it is (16, 32)"]),
        ({"head_dim": 16}, ["head_dim: 16", "k_proj.weight is (32, 32)", "it is (16, 32)"]),
        ({"intermediate_size": 64}, ["intermediate_size: 64", "mlp.down_proj.weight is (32, 64)", "it is (32, 48)"]),
        ({"hidden_size": 33}, ["33"]),
        ({"model_type": "no-such-type"}, ["no-such-type"]),
    ],
    ids=str,
)
def test_a_config_that_disagrees_with_the_weights_is_told_by_key_and_shape(
    workspace: Workspace, values: dict[str, Any], said: list[str]
) -> None:
    for name in ("base", "one", "two"):
        changed(workspace.root / name, **values)
    refused(workspace, *said)


def test_a_merge_by_a_recipe_needs_weights_for_all_layers_that_the_config_names(workspace: Workspace) -> None:
    for name in ("one", "two"):
        changed(workspace.root / name, num_hidden_layers=4)
    (workspace.root / "recipe.yml").write_text(RECIPE)
    status, printed = workspace.llmevo("merge", "recipe.yml", "out")
    assert status == 2, printed
    assert "num_hidden_layers: 4" in printed
    assert "no weight belongs to layer 2" in printed


@pytest.mark.parametrize(("model", "value", "status"), [("two", float("nan"), 0), ("base", float("inf"), 2)])
def test_a_model_with_weights_that_are_not_finite_is_named_before_the_first_candidate(
    workspace: Workspace, model: str, value: float, status: int
) -> None:
    file = workspace.root / model / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][0, 3] = value
    save_file(weights, file, metadata={"format": "pt"})
    config = workspace.config(search={"optimizer": "cma-es", "budget": 8}, llm=None)
    ended, printed = workspace.llmevo("run", config, "--out", "run")
    assert ended == status, printed
    words = " ".join(printed.split())
    assert f"{model} has weights that are not finite (NaN or infinite): model.layers.1.mlp.up_proj.weight." in words
    assert "engine does not hold" not in words


def test_weights_that_are_not_finite_are_told_in_place_of_an_engine_that_differs(workspace: Workspace) -> None:
    file = workspace.root / "one" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})

    class Differing:
        def swap(self, recipe: Recipe) -> None:
            pass

        def differences(self, folder: Path) -> list[str]:
            return ["'one two' (nan in vLLM, nan in transformers)"]

    engine: Any = Differing()
    sources = Sources(workspace.root)
    healthy = Recipe.of_one(ModelReference.parse("two"))
    with pytest.raises(EngineError, match="differs from the exported model"):
        check_engine(engine, healthy, sources, 0)
    half = {"model": "one", "parameters": {"weight": 0.0}}
    recipe = Recipe.model_validate(
        {"merge_method": "linear", "models": [half, {"model": "two", "parameters": {"weight": 1.0}}]}
    )
    with pytest.raises(SourceError, match=r"one has weights that are not finite.*model\.norm\.weight"):
        check_engine(engine, recipe, sources, 0)


@pytest.mark.parametrize("in_place", [True, False])
def test_layers_for_the_prediction_of_several_tokens_may_follow_the_last(workspace: Workspace, in_place: bool) -> None:
    folder = workspace.root / "base"
    weights = load_file(folder / "model.safetensors")
    extra = {name.replace("layers.1.", "layers.2."): of.clone() for name, of in weights.items() if "layers.1." in name}
    save_file({**weights, **extra}, folder / "model.safetensors", metadata={"format": "pt"})
    reference = ModelReference.parse("base")
    with pytest.raises(SourceError, match="num_hidden_layers: 2, but there are weights of layer 2"):
        Sources.open([reference], workspace.root)
    changed(folder, num_nextn_predict_layers=1)
    check_loadable(folder, Sources.open([reference], workspace.root)[reference].shapes, in_place)


@pytest.mark.parametrize("in_place", [True, False])
def test_weights_that_the_checkpoint_lacks_are_refused_by_number_and_name(workspace: Workspace, in_place: bool) -> None:
    folder, lost = workspace.root / "base", "model.layers.1.mlp.up_proj.weight"
    shapes = {name: shape for name, shape in Checkpoint(folder).shapes.items() if name != lost}
    with pytest.raises(SourceError, match=f"lacks 1 of the weights of LlamaForCausalLM, the first is {lost}"):
        check_loadable(folder, shapes, in_place)


@pytest.mark.parametrize("architecture", ["llama", "tied"])
def test_models_that_the_engine_runs_pass(workspace: Workspace, architecture: str) -> None:
    from support.tiny_model import save_tiny

    folder = save_tiny(workspace.root / "other", tied=architecture == "tied")
    check_loadable(folder, Checkpoint(folder).shapes)
