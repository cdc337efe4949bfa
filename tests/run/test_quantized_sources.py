"""Searches over quantized models and adapters: the engine runs the dequantized model, and noise is warned of."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from llmevo.config import read_config
from llmevo.run.preflight.quantization import compared, noise, quantized
from llmevo.run.scorer import Scorer
from support.checkpoints import new_adapter, weights_of
from support.quantized import quantize_folder
from support.workspace import Workspace

FP8 = "fp8 by tensor, ModelOpt"


def scorer(workspace: Workspace) -> Scorer:
    return Scorer(read_config(workspace.config()), workspace.root)


def test_a_search_over_quantized_models_scores_and_exports_dequantized_ones(workspace: Workspace) -> None:
    root = workspace.root
    quantize_folder(root / "base", FP8)
    quantize_folder(root / "one", "int8, bitsandbytes")
    adapter = new_adapter(root / "adapter", root / "two", target_modules=["q_proj", "down_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(root / "two")}))
    genome = {"base_model": "base", "models": ["one", "adapter"], "merge_method": "ties", "dtype": "bfloat16"}
    # The engine compares its weights with those of an exported merge before its first score (`engine.self_check`).
    workspace.config(genome=genome, heldout=None)
    status, printed = workspace.llmevo(
        "run", root / "config.yml", "--optimizer", "random", "--budget", 4, "--out", root / "run", "--backend", "hf"
    )
    assert status == 0, printed
    assert "scales of activations or of the key-value cache" in printed
    status, printed = workspace.llmevo("export", root / "run", root / "out")
    assert status == 0, printed
    assert "quantization_config" not in json.loads((root / "out" / "config.json").read_text())
    assert {weight.dtype for weight in weights_of(root / "out").values()} == {torch.bfloat16}


def test_a_task_vector_under_the_rounding_errors_is_warned_of(workspace: Workspace) -> None:
    root = workspace.root
    weights = weights_of(root / "base")
    exact = torch.Generator().manual_seed(1)
    for name, size in (("one", 0.001), ("two", 0.3)):
        changed = {n: w + torch.randn(w.shape, generator=exact) * size * w.std() for n, w in weights.items()}
        save_file(changed, root / name / "model.safetensors", {"format": "pt"})
    assert not [*noise(scorer(workspace))]
    for name in ("base", "one", "two"):
        quantize_folder(root / name, FP8)
    (finding,) = noise(scorer(workspace))
    assert finding.model == "one"
    assert "both are quantized, and the expected rounding error is" in finding.what
    assert len([*quantized(scorer(workspace))]) == 3


def test_the_expected_errors_are_near_those_that_were_made(workspace: Workspace) -> None:
    root = workspace.root
    exact = {name: weights_of(root / name) for name in ("base", "one")}
    read = {name: quantize_folder(root / name, "int8, bitsandbytes") for name in ("base", "one")}
    layers = [name for name in exact["one"] if name.endswith("_proj.weight")]
    made = sum(
        float((read["one"][n] - read["base"][n] - exact["one"][n] + exact["base"][n]).square().sum())
        for n in layers[:12]
    )
    sources = scorer(workspace).sources
    one, base = (sources[each] for each in scorer(workspace).config.genome.references[1::-1])
    vector, error = compared(one, base)
    assert error / made**0.5 == pytest.approx(1, rel=0.15)
    assert vector > 10 * error


def test_an_adapter_on_the_quantized_base_has_no_rounding_errors(workspace: Workspace) -> None:
    root = workspace.root
    adapter = new_adapter(root / "adapter", root / "base")
    shutil.rmtree(root / "one")
    adapter.rename(root / "one")
    quantize_folder(root / "base", FP8)
    config = workspace.config(genome={"base_model": "base", "models": ["base+one"], "merge_method": "task_arithmetic"})
    assert not [*noise(Scorer(read_config(config), root))]
