"""Merges in FP8: compressed-tensors and transformers read what was rounded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from llmevo.errors import UserError
from llmevo.export.merge import merge
from llmevo.merging.recipe import Recipe
from llmevo.models.quantize import quantizer
from support.checkpoints import quietly, weights_of
from support.families import new_family
from support.workspace import Workspace

HALVES = """
merge_method: linear
models: [{model: one, parameters: {weight: 0.6}}, {model: two, parameters: {weight: 0.4}}]
dtype: bfloat16
"""
ONE = Recipe.from_yaml("merge_method: linear\nmodels: [{model: one, parameters: {weight: 1}}]")


@pytest.fixture
def written(workspace: Workspace) -> dict[str, torch.Tensor]:
    """The tensors of a merge in FP8, in `fp8`; the same merge is in `whole`."""
    Path("recipe.yml").write_text(HALVES)
    assert workspace.llmevo("merge", "recipe.yml", "whole")[0] == 0
    status, printed = workspace.llmevo("merge", "recipe.yml", "fp8", "--as", "fp8")
    assert (status, "vllm serve fp8" in printed) == (0, True), printed
    return load_file("fp8/model.safetensors")


def test_matrices_are_e4m3_with_a_scale_for_each_channel_and_the_rest_is_as_merged(
    written: dict[str, torch.Tensor],
) -> None:
    whole = weights_of(Path("whole"))
    for name, weight in whole.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(written[name], weight), name
            continue
        codes, scales = written[name], written[f"{name}_scale"]
        assert (codes.dtype, scales.shape, scales.dtype) == (torch.float8_e4m3fn, (len(weight), 1), torch.bfloat16)
        largest = weight.float().abs().amax(1, keepdim=True)
        assert torch.allclose(scales.float(), largest / 448, rtol=0.01)  # the definition: max|row| / 448
        error = (codes.float() * scales.float() - weight.float()).abs()
        assert (error <= weight.float().abs() / 16 + 2**-9 * scales.float() + 0.01 * weight.float().abs()).all()
    assert len(written) == len(whole) + 2 * 7


def test_what_is_scored_in_fp8_is_what_the_files_hold(written: dict[str, torch.Tensor]) -> None:
    whole = weights_of(Path("whole"))
    config = json.loads(Path("whole/config.json").read_text())
    rounding = quantizer("fp8", {name: weight.shape for name, weight in whole.items()}, config)
    for name, weight in whole.items():
        if f"{name}_scale" in written:
            stands_for = written[name].to(torch.bfloat16) * written[f"{name}_scale"]
            assert torch.equal(rounding.rounded(name, weight), stands_for), name
        else:
            assert rounding.rounded(name, weight) is weight


def test_compressed_tensors_reads_the_config_and_the_weights(written: dict[str, torch.Tensor]) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = json.loads(Path("fp8/config.json").read_text())
    assert config["dtype"] == "bfloat16"
    given = quantization.QuantizationConfig.model_validate(config["quantization_config"])
    (scheme,) = given.config_groups.values()
    assert (scheme.weights.strategy, scheme.weights.num_bits) == ("channel", 8)
    assert scheme.input_activations.dynamic is True
    assert given.ignore == ["lm_head"]
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    name = "model.layers.0.mlp.up_proj.weight"
    weight = weights_of(Path("whole"))[name]
    scale = written[f"{name}_scale"]
    theirs = forward.quantize(weight, scale, torch.zeros_like(scale), scheme.weights, dtype=torch.float8_e4m3fn)
    assert torch.equal(theirs.float(), written[name].float())


@pytest.mark.usefixtures("written")
def test_transformers_loads_the_model_and_answers_nearly_as_before() -> None:
    pytest.importorskip("compressed_tensors")
    loaded: Any = quietly(lambda: AutoModelForCausalLM.from_pretrained("fp8")).eval()
    whole: Any = AutoModelForCausalLM.from_pretrained("whole").eval()
    prompt = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        found, wanted = (model(prompt).logits.float() for model in (loaded, whole))
    error = float((found - wanted).norm() / wanted.norm())
    assert 0.001 < error < 0.2, error


def test_a_stack_of_layers_is_rounded_as_well(workspace: Workspace) -> None:
    slices = [{"sources": [{"model": "one", "layer_range": [0, 1]}]}] * 3
    merge(Recipe.model_validate({"merge_method": "passthrough", "slices": slices}), "out", as_="fp8")
    held = load_file("out/model.safetensors")
    assert held["model.layers.2.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert workspace.root == Path.cwd()


def test_a_config_with_an_infinite_number_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    new_family(tmp_path, "Mamba 2")
    assert "Infinity" in Path("base/config.json").read_text()
    merge(ONE, "out", as_="fp8")
    assert any(weight.dtype == torch.float8_e4m3fn for weight in weights_of(Path("out")).values())


def test_a_model_of_images_and_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    new_family(tmp_path, "Qwen3-VL")
    with pytest.raises(UserError, match="--as fp8: one is a multimodal model"):
        merge(ONE, "out", as_="fp8")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_models_whose_matrices_are_no_linear_layers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=4)).save_pretrained("one")
    with pytest.raises(UserError, match=r"--as fp8: transformer\.h\.0\.\S+\.weight is a matrix, but of no"):
        merge(ONE, "out", as_="fp8")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
