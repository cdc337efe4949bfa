"""Quantized checkpoints as sources: each format equals what the library that writes it reads, and errors are named."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llmevo.errors import SourceError
from llmevo.merging.merger import Merger, merge
from llmevo.merging.recipe import Recipe
from llmevo.merging.writer import write_model
from llmevo.models.checkpoints import Checkpoint, LowRank, same
from llmevo.models.quantized_checkpoint import QuantizedCheckpoint, quantization_of
from llmevo.models.sources import Sources
from support.checkpoints import assert_same_bits, new_adapter, new_checkpoint, quietly, references, weights_of
from support.quantized import KINDS, change_config, quantized_checkpoint

Weights = dict[str, Tensor]
UP = "model.layers.1.mlp.up_proj"
FP8 = "fp8 by block"


def opened(folder: Path) -> QuantizedCheckpoint:
    given = quantization_of(folder)
    assert given
    return QuantizedCheckpoint(folder, given)


@pytest.mark.parametrize("kind", KINDS)
def test_each_format_is_read_as_its_library_reads_it(kind: str, tmp_path: Path) -> None:
    expected = quantized_checkpoint(tmp_path / "model", kind)
    source = opened(tmp_path / "model")
    assert {name: tuple(weight.shape) for name, weight in expected.items()} == dict(source.shapes)
    for name, weight in expected.items():
        torch.testing.assert_close(source.tensor(name).float(), weight.float(), rtol=1e-6, atol=1e-8)
    exact = weights_of(new_checkpoint(tmp_path / "exact", 1, hidden=64, layers=2))
    error = float((source.tensor(f"{UP}.weight").float() - exact[f"{UP}.weight"]).square().sum())
    # The errors that are expected without knowing the exact weights are those that were made.
    assert 0.6 < math.sqrt(source.rounding_error(f"{UP}.weight") / error) < 1.7
    assert source.rounding_error("model.norm.weight") == 0


@pytest.mark.parametrize("shape", [(70, 50), (64, 40), (33, 48), (20, 10)])
def test_blocks_that_do_not_divide_a_weight_are_cut_at_its_edges(shape: tuple[int, int], tmp_path: Path) -> None:
    rows, columns = shape
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 32), -(-columns // 16)) + 0.5
    expected = weight.float()
    for i in range(rows):
        for j in range(columns):
            expected[i, j] *= scale[i // 32, j // 16]
    save_file({"x.weight": weight, "x.weight_scale_inv": scale}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 16]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(opened(tmp_path).tensor("x.weight"), expected)


def gpt_oss(folder: Path) -> dict[str, Tensor]:
    """Save a tiny gpt-oss in MXFP4; return its weights as transformers dequantizes them."""
    config = GptOssConfig(
        vocab_size=32, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    made: Any = GptOssForCausalLM(config)
    quietly(lambda: made.to(torch.bfloat16).save_pretrained(folder))
    stored: Weights = {}
    expected: Weights = {}
    random = torch.Generator().manual_seed(2)
    for name, weight in weights_of(folder).items():
        expected[name] = stored[name] = weight
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = weight.shape
            blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=random)
            scales = torch.randint(110, 125, (experts, rows, columns // 32), dtype=torch.uint8, generator=random)
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            expected[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": []})
    return expected


def test_gpt_oss_is_read_bit_for_bit_as_transformers_dequantizes_it(tmp_path: Path) -> None:
    expected, source = gpt_oss(tmp_path / "model"), opened(tmp_path / "model")
    assert_same_bits({name: source.tensor(name) for name in source.shapes}, expected)


@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_of_bitsandbytes_stand_for_entries_of_their_table(nested: bool, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(1)
    table, bytes_ = torch.linspace(-1, 1, 16), torch.randint(256, (5 * 50 // 2, 1), dtype=torch.uint8, generator=random)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [5, 50]}
    scales = torch.rand(4, generator=random)
    parts = {"x.weight": bytes_, "x.weight.quant_map": table, "x.weight.absmax": scales}
    if nested:
        codes, coarse = torch.tensor([3, 200, 0, 255], dtype=torch.uint8), torch.linspace(-1, 1, 256)
        parts |= {"x.weight.absmax": codes, "x.weight.nested_absmax": torch.tensor([0.3, 0.7])}
        parts["x.weight.nested_quant_map"] = coarse
        state |= {"nested_blocksize": 2, "nested_offset": 0.5}
        scales = coarse[codes.long()] * torch.tensor([0.3, 0.3, 0.7, 0.7]) + 0.5
    described = torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8)
    save_file({**parts, "x.weight.quant_state.bitsandbytes__nf4": described}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    numbers = [n for byte in bytes_.flatten().tolist() for n in (byte >> 4, byte & 15)]
    expected = torch.stack([table[n] * scales[place // 64] for place, n in enumerate(numbers)]).view(5, 50)
    assert torch.equal(opened(tmp_path).tensor("x.weight"), expected)


# --- as a source ------------------------------------------------------------------------------------------------


def test_scales_of_activations_are_left_out_by_name(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "model", "fp8 by tensor, ModelOpt")
    source = opened(tmp_path / "model")
    ends = {name.rpartition(".")[2] for name in source.derived}
    assert ends == {"input_scale", "k_scale", "v_scale"}
    assert len(source.derived) == 2 * (7 + 2)
    assert not any(name.endswith("_scale") for name in source.shapes)


def test_all_readers_of_a_time_get_the_same_tensor(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "model", FP8)
    folders = [
        new_adapter(tmp_path / str(seed), new_checkpoint(tmp_path / "plain", hidden=64, layers=2), seed)
        for seed in (1, 2)
    ]
    base, one, two = references("model", *(f"model+{folder}" for folder in folders))
    sources = Sources.open([base, one, two], tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    origin, weights = sources[base].tensor(name), [sources[each].weight(name) for each in (one, two)]
    assert all(isinstance(weight, LowRank) and same(weight.origin, origin) for weight in weights)


METHODS: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "linear": ({"weight": 0.6}, {}),
    "task_arithmetic": ({"weight": 0.6}, {}),
    "ties": ({"weight": 0.6, "density": 0.5}, {}),
    "dare_ties": ({"weight": 0.6, "density": 0.5}, {}),
    "slerp": ({}, {"t": 0.4}),
    "sce": ({}, {"select_topk": 0.5}),
    "model_stock": ({}, {}),
    "karcher": ({}, {}),
}
"""Parameters of each model, and of the merge."""


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_of_quantized_models_is_that_of_the_dequantized_ones(method: str, tmp_path: Path) -> None:
    for place, kind in enumerate((FP8, "int4 packed", "nvfp4")):
        expected = quantized_checkpoint(tmp_path / f"q{place}", kind, seed=place)
        config = new_checkpoint(tmp_path / f"d{place}", hidden=64, layers=2)
        save_file({name: weight.contiguous() for name, weight in expected.items()}, config / "model.safetensors")
    each, shared = METHODS[method]

    def merged(letter: str) -> dict[str, Tensor]:
        models = references(*(f"{letter}{place}" for place in range(2 if method == "slerp" else 3)))
        recipe = {
            "merge_method": method,
            "models": [{"model": model, "parameters": each} for model in models],
            "parameters": shared,
            "dtype": "float32",
            **({} if method in ("linear", "karcher") else {"base_model": models[0]}),
        }
        sources = Sources.open(models, tmp_path)
        # The seeds of random masks depend on the models' names.
        return dict(merge(Recipe.model_validate(recipe), sources, lambda _, model: int(model.name[1:])))

    assert_same_bits(merged("q"), merged("d"))


def test_the_rounding_of_a_model_with_a_tied_head_is_known_behind_that_of_the_base(tmp_path: Path) -> None:
    new_checkpoint(tmp_path / "base", hidden=64, layers=2)
    quantized_checkpoint(tmp_path / "model", FP8, seed=1)
    file = tmp_path / "model" / "model.safetensors"
    save_file({name: weight for name, weight in weights_of(file.parent).items() if "lm_head" not in name}, file)
    change_config(tmp_path / "model", tie_word_embeddings=True)
    base, model = references("base", "model")
    sources = Sources.open([base, model], tmp_path)
    behind, own = sources[model], sources.own(model)
    assert (type(behind).__name__, type(own).__name__) == ("PlacedModel", "QuantizedCheckpoint")
    assert {*behind.quantized} == {*own.quantized}
    assert behind.rounding_error(f"{UP}.weight") == own.rounding_error(f"{UP}.weight") > 0


@pytest.mark.parametrize("dtype", ["float32", None])
def test_a_merge_is_written_without_a_quantization(dtype: str | None, tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "one", FP8, seed=1, dtype=torch.bfloat16)
    quantized_checkpoint(tmp_path / "two", "gptq", seed=2, dtype=torch.bfloat16)
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("one", "two")]
    recipe = Recipe.model_validate({"merge_method": "linear", "models": models, "dtype": dtype})
    write_model(recipe, Sources.open(recipe.references, tmp_path), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    # Without a type, weights are written in the type that the models' configs name.
    assert config["dtype"] == (dtype or "bfloat16")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_bits(
        {f"{UP}.weight": loaded.state_dict()[f"{UP}.weight"]},
        {f"{UP}.weight": weights_of(tmp_path / "out")[f"{UP}.weight"]},
    )


def test_an_engine_starts_from_a_folder_without_the_quantization(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "model", FP8)
    (reference,) = references("model")
    sources = Sources(tmp_path)
    folder = sources.engine_folder(reference)
    assert folder == sources.engine_folder(reference) != tmp_path / "model"
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert Checkpoint(folder).shapes == sources[reference].shapes
    assert (folder / "model.safetensors").stat().st_blocks * 512 < 32_768  # the zeros take no room
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert float(model.state_dict()[f"{UP}.weight"].abs().sum()) == 0


def test_the_checksum_covers_the_quantization(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "model", "gptq")
    (reference,) = references("model")
    before = Sources(tmp_path).checksum(reference)
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    change_config(tmp_path / "model", quantization_config={**config, "checkpoint_format": "gptq_v2"})
    assert Sources(tmp_path).checksum(reference) != before


def test_opening_and_counting_dequantize_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized_checkpoint(tmp_path / "model", FP8)
    base, *_ = references("model")
    recipe = Recipe.of_one(base)
    monkeypatch.setattr("llmevo.models.quantized_checkpoint.scaled", lambda *_: pytest.fail("a weight was read"))
    merger = Merger(Sources.open([base], tmp_path))
    assert len(merger.digests(recipe)) == len(merger.sources[base].shapes)


# --- refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"quant_method": "hqq"},
            "quant_method is 'hqq'; llmevo reads fp8, .*: name the model that it was quantized from",
        ),
        ({"bits": 4}, "quant_method is None"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "format is 'marlin-24'"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "sparsity_config": {"format": "sparse-bitmask"},
            },
            "sparsity_config.format is 'sparse-bitmask'",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}},
            "transform_config: its weights are rotated",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv'"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ([4], r"quantization_config is \[4\]; it must be an object"),
    ],
)
def test_a_quantization_that_is_not_read_is_refused_by_key_and_value(config: Any, said: str, tmp_path: Path) -> None:
    new_checkpoint(tmp_path / "model", hidden=64, layers=1)
    change_config(tmp_path / "model", quantization_config=config)
    with pytest.raises(SourceError, match=said) as raised:
        Sources.open(references("model"), tmp_path)
    assert "\n" not in str(raised.value)


def without(end: str) -> Callable[[Weights], Any]:
    return lambda weights: weights.pop(f"{UP}.{end}")


def shaped(end: str, *shape: int) -> Callable[[Weights], Any]:
    return lambda weights: weights.update({f"{UP}.{end}": torch.ones(shape).to(weights[f"{UP}.{end}"].dtype)})


BROKEN: dict[str, tuple[str, Callable[[Weights], Any], str]] = {
    "scales missing": (FP8, without("weight_scale_inv"), "is stored as F8_E4M3, but .*_scale_inv is missing"),
    "scales of another shape": (FP8, shaped("weight_scale_inv", 3, 3), r"\(3, 3\), .* and blocks are \[32, 16\]"),
    "scales without a weight": (
        FP8,
        lambda w: w.update({f"{UP}.weight": torch.ones(128, 64)}),
        "weight_scale_inv belongs to no quantized weight",
    ),
    "second scale missing": ("nvfp4, ModelOpt", without("weight_scale_2"), r"weight_scale_2\) is missing"),
    "second scale of another shape": ("nvfp4, ModelOpt", shaped("weight_scale_2", 2), "it must be one number"),
    "global scale missing": ("nvfp4", without("weight_global_scale"), r"weight_global_scale\) is missing"),
    "group scales of another shape": ("nvfp4", shaped("weight_scale", 128, 5), r"\(128, 5\), which does not fit"),
    "scaled inputs": (
        "nvfp4, ModelOpt",
        lambda w: w.update({f"{UP}.pre_quant_scale": torch.ones(64)}),
        "pre_quant_scale belongs to no quantized weight",
    ),
    "shape missing": ("int4 packed", without("weight_shape"), r"weight_shape\) is missing"),
    "packed of another shape": ("int4 packed", shaped("weight_packed", 128, 3), r"has 3 int32 for 64 weights of a row"),
    "packed rows": ("int4 packed", shaped("weight_packed", 127, 8), r"\(127, 8\), which does not fit"),
    "zero points of another shape": ("int8 with zero points", shaped("weight_zero_point", 4, 1), r"must be \(128, 1\)"),
    "AWQ without scales": ("awq", without("scales"), r"scales\) is missing"),
    "AWQ of another shape": ("awq", shaped("qweight", 64, 3), r"qweight has the shape \(64, 3\), which does not fit"),
    "GPTQ of three bits": ("gptq", shaped("qweight", 6, 128), "packs weights of 3 bits"),
    "GPTQ's zero points": ("gptq", shaped("qzeros", 4, 3), r"qzeros has the shape \(4, 3\); it must be \(4, 16\)"),
    "rows without scales": ("int8, bitsandbytes", without("SCB"), r"is stored as I8, but .*_scale.* is missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_quantized_model_is_refused_by_tensor(case: str, tmp_path: Path) -> None:
    kind, change, said = BROKEN[case]
    quantized_checkpoint(tmp_path / "model", kind)
    file = tmp_path / "model" / "model.safetensors"
    weights = weights_of(tmp_path / "model")
    change(weights)
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(SourceError, match=said) as raised:
        Sources.open(references("model"), tmp_path)
    assert "\n" not in str(raised.value)
    assert re.search(r"download the model again, or name the model that it was quantized from", str(raised.value))


def test_a_torn_quantized_model_is_refused_by_file(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "model", FP8)
    with (tmp_path / "model" / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(SourceError, match=r"model\.safetensors is incomplete"):
        Sources.open(references("model"), tmp_path)


def test_the_size_of_blocks_must_be_two_numbers(tmp_path: Path) -> None:
    quantized_checkpoint(tmp_path / "model", FP8)
    change_config(tmp_path / "model", quantization_config={"quant_method": "fp8", "weight_block_size": [128]})
    with pytest.raises(SourceError, match=r"the size of blocks is \[128\]; it must be two whole numbers"):
        opened(tmp_path / "model")
