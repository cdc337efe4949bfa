"""Weights as they are read: whole or refused, mapped, and with LoRA adapters as PEFT has them."""

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from llmevo.errors import SourceError
from llmevo.merging.methods.base import TensorGroup
from llmevo.models import files
from llmevo.models.adapters import LoraModel
from llmevo.models.checkpoints import Checkpoint, LowRank
from llmevo.models.files import cache_folder, content_checksums, kept_file, unread_bytes
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from support.checkpoints import (
    assert_near,
    assert_same_bits,
    merged_by_peft,
    new_adapter,
    new_checkpoint,
    references,
    tensors,
    weights_of,
)
from support.workers import until

QUERY = "model.layers.1.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_checkpoint(tmp_path_factory.mktemp("models") / "model", seed=1)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_checkpoint(tmp_path_factory.mktemp("models") / "sharded", seed=1, shard="10KB")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return new_adapter(tmp_path_factory.mktemp("models") / "adapter", model)


def copy_of(folder: Path, to: Path) -> Path:
    return shutil.copytree(folder, to)


def changed_adapter(adapter: Path, to: Path, **changes: Any) -> Path:
    """A copy of an adapter whose config says something else."""
    config = copy_of(adapter, to) / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return to


# --- checkpoints ------------------------------------------------------------------------------------------------


def test_a_sharded_checkpoint_is_read_like_a_single_file(model: Path, sharded: Path) -> None:
    assert len([*sharded.glob("*.safetensors")]) > 3
    one, many = Checkpoint(model), Checkpoint(sharded)
    assert many.shapes == one.shapes
    assert_same_bits(tensors(many), tensors(one))
    assert_same_bits(tensors(one), weights_of(model))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_not_among_the_tensors(family: Any, tied: bool, tmp_path: Path) -> None:
    shapes = Checkpoint(new_checkpoint(tmp_path / "model", family=family, tied=tied)).shapes
    assert ("lm_head.weight" in shapes) is not tied
    assert ("model.layers.0.self_attn.q_proj.bias" in shapes) is (family == "qwen2")
    assert shapes["model.embed_tokens.weight"] == (64, 16)


def test_tensors_are_views_of_the_mapped_file(model: Path) -> None:
    checkpoint = Checkpoint(model)
    first, second = checkpoint.tensor(QUERY), checkpoint.tensor(QUERY)
    assert first.data_ptr() == second.data_ptr()
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


@pytest.mark.parametrize("keep", [0, 4, 200, 0.5, -1])
def test_a_torn_weight_file_is_refused_by_name(model: Path, tmp_path: Path, keep: float) -> None:
    file = copy_of(model, tmp_path / "torn") / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(SourceError, match=r"model\.safetensors is (empty|incomplete or not a safetensors).*; download"):
        Checkpoint(file.parent)


def test_a_missing_shard_is_found_on_opening(sharded: Path, tmp_path: Path) -> None:
    folder = copy_of(sharded, tmp_path / "holed")
    lost = sorted(folder.glob("*.safetensors"))[2]
    lost.unlink()
    with pytest.raises(SourceError, match=rf"lists \S+ in {lost.name}, which is missing"):
        Checkpoint(folder)


@pytest.mark.parametrize("content", ['{"weight_map": {"a', "{}", "[]", '{"weight_map": []}'])
def test_a_torn_index_is_refused_by_name(sharded: Path, tmp_path: Path, content: str) -> None:
    folder = copy_of(sharded, tmp_path / "torn")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(SourceError, match=r"index\.json (is not valid JSON|holds|is no index).*; download"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer, .*git lfs pull"),
        ("<!DOCTYPE html>\n<html>Access denied</html>", "a web page, not the file itself"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_something_else_is_said_to_be_that(
    content: str, said: str, name: str, model: Path, tmp_path: Path
) -> None:
    (copy_of(model, tmp_path / "copy") / name).write_text(content)
    with pytest.raises(SourceError, match=rf"copy.{name} is {said}"):
        Sources.open(references("copy"), tmp_path)


def test_a_shard_that_no_index_lists_is_missed_by_its_number(sharded: Path, tmp_path: Path) -> None:
    folder = copy_of(sharded, tmp_path / "holed")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(SourceError, match=r"shard 2 of \d+ is missing"):
        Checkpoint(folder)


def test_files_of_an_earlier_save_are_not_read(model: Path, sharded: Path, tmp_path: Path) -> None:
    other = weights_of(new_checkpoint(tmp_path / "other", seed=2))
    whole, many = copy_of(model, tmp_path / "whole"), copy_of(sharded, tmp_path / "many")
    for folder in (whole, many):
        save_file(other, folder / "model-00001-of-00001.safetensors")
    save_file(other, whole / "model_ema.safetensors")
    shutil.copy(sharded / "model.safetensors.index.json", whole)
    for folder in (whole, many):
        assert_same_bits(tensors(Checkpoint(folder)), weights_of(model))


def test_a_tensor_in_two_files_is_refused_with_both_names(sharded: Path, tmp_path: Path) -> None:
    folder = copy_of(sharded, tmp_path / "twice")
    (folder / "model.safetensors.index.json").unlink()
    save_file(weights_of(sharded), folder / "model_ema.safetensors")
    with pytest.raises(SourceError, match=r"\S+ is in model-0\S+ and in model_ema.safetensors; remove"):
        Checkpoint(folder)


def test_an_index_without_any_shard_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = copy_of(sharded, tmp_path / "empty")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(SourceError, match=r"index\.json lists \d+ shards, and all are missing"):
        Checkpoint(folder)


def test_a_folder_without_safetensors_says_how_to_save_them(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"there is no \.safetensors file; save the model with"):
        Checkpoint(tmp_path)


def test_tensors_that_the_config_determines_are_left_out(tmp_path: Path) -> None:
    save_file(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "model.norm.weight": torch.ones(2)},
        tmp_path / "model.safetensors",
    )
    assert [*Checkpoint(tmp_path).shapes] == ["model.norm.weight"]


LAYER = "model.layers.0.mlp.up_proj"

QUANTIZED: dict[str, tuple[str, torch.Tensor, str]] = {
    "int8": (f"{LAYER}.weight", torch.ones(4, 4, dtype=torch.int8), "int8"),
    "float8": (f"{LAYER}.weight", torch.ones(4, 4).to(torch.float8_e4m3fn), "F8_E4M3"),
    "AWQ and GPTQ": (f"{LAYER}.qweight", torch.ones(4, 1, dtype=torch.int32), "int32"),
    "bitsandbytes": (f"{LAYER}.weight", torch.ones(8, 1, dtype=torch.uint8), "uint8"),
    "integers": (f"{LAYER}.weight", torch.ones(4, 4, dtype=torch.int64), "int64"),
    "a bias": (f"{LAYER}.bias", torch.ones(4, dtype=torch.int8), "int8"),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_refused_by_tensor_and_type(kind: str, tmp_path: Path) -> None:
    name, tensor, dtype = QUANTIZED[kind]
    save_file({name: tensor, "model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=f"{tmp_path.name}: {name} is stored as {dtype};.*dequantize"):
        Checkpoint(tmp_path)


def test_integers_that_are_no_weights_are_read_as_they_are(tmp_path: Path) -> None:
    buffers = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "embeddings.position_ids": torch.arange(4).reshape(1, 4),
        "model.steps": torch.arange(4, dtype=torch.int32),
    }
    save_file({**buffers, "model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in buffers.items():
        assert torch.equal(checkpoint.tensor(name), tensor)


def test_a_task_vector_is_the_difference_in_float32(tmp_path: Path) -> None:
    one = Checkpoint(new_checkpoint(tmp_path / "one", seed=1, dtype=torch.bfloat16))
    base = Checkpoint(new_checkpoint(tmp_path / "base", seed=2, dtype=torch.bfloat16))
    delta = task_vector(one, base, QUERY)
    assert delta.dtype == torch.float32
    assert torch.equal(delta, one.tensor(QUERY).float() - base.tensor(QUERY).float())


def test_a_weight_is_one_and_the_same_view_of_the_file(tmp_path: Path) -> None:
    one = Checkpoint(new_checkpoint(tmp_path / "one", seed=1))
    assert one.tensor(QUERY).data_ptr() == one.tensor(QUERY).data_ptr()


def task_vector(model: Checkpoint | LoraModel, base: Checkpoint, name: str) -> Tensor:
    return TensorGroup(base.tensor(name), [model.weight(name)], {}, {}, [0]).delta(0)


# --- LoRA -------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all linear layers": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True, "r": 3},
    "alpha by module": {"alpha_pattern": {"q_proj": 1, "layers.1.mlp.down_proj": 9}},
    "alpha by expression": {"alpha_pattern": {r"^model\.layers\.[12]\.self_attn\.q_proj": 11, "proj": 40}},
    "rank by module": {"rank_pattern": {"down_proj": 4}},
    "some layers": {"layers_to_transform": [1, 3]},
    "rank and alpha with rslora": {
        "use_rslora": True,
        "rank_pattern": {r"layers\.\d\.self_attn\.q_proj": 4},
        "alpha_pattern": {"q_proj": 5},
    },
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapted_model_equals_what_peft_merges(kind: str, model: Path, tmp_path: Path) -> None:
    adapter = new_adapter(tmp_path / "adapter", model, **ADAPTERS[kind])
    adapted = LoraModel(Checkpoint(model), adapter)
    assert_near(tensors(adapted), merged_by_peft(model, adapter), rtol=0, atol=1e-6)
    assert not torch.equal(adapted.tensor(QUERY), adapted.model.tensor(QUERY))


def test_the_task_vector_of_an_adapter_on_its_own_model_is_its_low_rank_product(model: Path, adapter: Path) -> None:
    base = Checkpoint(model)
    adapted = LoraModel(base, adapter)
    factors = weights_of(adapter)
    stem = "base_model.model.model.layers.1.mlp.down_proj"
    product = factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double() * (6 / 2)
    weight = adapted.weight(DOWN)
    assert isinstance(weight, LowRank)
    assert weight.origin.data_ptr() == base.tensor(DOWN).data_ptr()
    assert (weight.up.shape, weight.down.shape) == ((16, 2), (2, 32))
    delta = task_vector(adapted, base, DOWN)
    torch.testing.assert_close(delta.double(), product, rtol=1e-6, atol=1e-8)
    assert torch.linalg.matrix_rank(delta, rtol=1e-5) == 2
    torch.testing.assert_close(adapted.tensor(DOWN), base.tensor(DOWN) + delta, rtol=0, atol=1e-7)


def test_a_weight_that_is_not_adapted_is_the_models_own_and_has_no_task_vector(model: Path, adapter: Path) -> None:
    base = Checkpoint(model)
    adapted = LoraModel(base, adapter)
    assert isinstance(adapted.weight(KEY), Tensor)
    assert adapted.tensor(KEY).data_ptr() == base.tensor(KEY).data_ptr()


def test_the_task_vector_of_an_adapter_on_another_model_is_the_whole_difference(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    adapted = LoraModel(Checkpoint(model), adapter)
    other = Checkpoint(new_checkpoint(tmp_path / "other", seed=5))
    for name in (KEY, DOWN):
        assert torch.equal(task_vector(adapted, other, name), adapted.tensor(name) - other.tensor(name))


def test_reading_an_adapted_weight_changes_nothing_on_disk_or_in_the_next_read(model: Path, adapter: Path) -> None:
    adapted = LoraModel(Checkpoint(model), adapter)
    before = adapted.model.tensor(DOWN).clone()
    first = adapted.tensor(DOWN)
    first.zero_()
    assert torch.equal(adapted.model.tensor(DOWN), before)
    assert float(adapted.tensor(DOWN).abs().sum()) > 0


def test_empty_lists_in_an_adapters_config_are_none(model: Path, adapter: Path, tmp_path: Path) -> None:
    folder = changed_adapter(adapter, tmp_path / "adapter", modules_to_save=[], layer_replication=[])
    assert LoraModel(Checkpoint(model), folder).shapes


def test_an_adapter_on_a_changed_base_is_refused_with_the_way_out(model: Path, adapter: Path, tmp_path: Path) -> None:
    folder = changed_adapter(adapter, tmp_path / "adapter", init_lora_weights="pissa_niter_4")
    with pytest.raises(SourceError, match=r"init_lora_weights is 'pissa_niter_4': .* path_initial_model_for_weight"):
        LoraModel(Checkpoint(model), folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 0}, "r is 0; it must be a whole number of 1 or more"),
        ({"r": "two"}, "r is 'two'; it must be"),
        ({"r": None}, "r is None; it must be"),
        ({"lora_alpha": None}, "lora_alpha is None; it must be a number"),
        ({"r": 4}, "rank 2 in lora_A, 2 in lora_B and 4 in adapter_config.json"),
        ({"rank_pattern": {"q_proj": 5}}, "rank 2 in lora_A, 2 in lora_B and 5 in adapter_config.json"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj is 0; it must be a number"),
        ({"alpha_pattern": {"(": 2}}, "is no regular expression"),
        ({"alpha_pattern": [2]}, "must map names of modules to numbers"),
    ],
)
def test_an_adapters_numbers_are_checked_before_they_are_used(
    changes: dict[str, Any], said: str, model: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = changed_adapter(adapter, tmp_path / "adapter", **changes)
    with pytest.raises(SourceError, match=re.escape(said)):
        LoraModel(Checkpoint(model), folder)


FACTOR = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"


@pytest.mark.parametrize(("lost", "kept"), ["AB", "BA"])
def test_half_a_pair_of_factors_is_refused_by_name(
    lost: str, kept: str, model: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = copy_of(adapter, tmp_path / "adapter")
    factors = weights_of(folder)
    del factors[FACTOR.format(lost)]
    save_file(factors, folder / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=rf"has {FACTOR.format(kept)}, but {FACTOR.format(lost)} is missing"):
        LoraModel(Checkpoint(model), folder)


@pytest.mark.parametrize(
    ("which", "shape", "said"),
    [
        ("A", (2, 7), "lora_B (16, 2) times lora_A (2, 7) does not fit the weight (16, 32)"),
        ("B", (9, 2), "lora_B (9, 2) times lora_A (2, 32) does not fit the weight (16, 32)"),
        ("A", (3, 32), "rank 3 in lora_A, 2 in lora_B and 2 in adapter_config.json"),
        ("A", (2, 32, 1, 1), "is no linear layer"),
    ],
)
def test_factors_that_do_not_fit_are_refused_with_their_shapes(
    which: str, shape: tuple[int, ...], said: str, model: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = copy_of(adapter, tmp_path / "adapter")
    save_file({**weights_of(folder), FACTOR.format(which): torch.ones(shape)}, folder / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=re.escape(said)):
        LoraModel(Checkpoint(model), folder)


def test_an_adapter_without_factors_is_refused(model: Path, adapter: Path, tmp_path: Path) -> None:
    folder = copy_of(adapter, tmp_path / "adapter")
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(SourceError, match="hold no LoRA factors"):
        LoraModel(Checkpoint(model), folder)


def test_a_model_where_an_adapter_should_be_is_named_as_that(model: Path, tmp_path: Path) -> None:
    other = copy_of(model, tmp_path / "other")
    with pytest.raises(SourceError, match=r"other is a model and no LoRA adapter"):
        LoraModel(Checkpoint(model), other)


def test_an_adapter_for_modules_that_the_model_lacks_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    deeper = new_checkpoint(tmp_path / "deeper", layers=6)
    folder = new_adapter(tmp_path / "adapter", deeper)
    with pytest.raises(SourceError, match=r"adapts model\.layers\.[45]\.\S+, which the model .* lacks"):
        LoraModel(Checkpoint(model), folder)


@pytest.mark.parametrize("content", [None, "{"])
def test_an_adapter_without_a_readable_config_is_refused(
    content: str | None, model: Path, adapter: Path, tmp_path: Path
) -> None:
    config = copy_of(adapter, tmp_path / "adapter") / "adapter_config.json"
    config.unlink() if content is None else config.write_text(content)
    with pytest.raises(SourceError, match=r"(missing|not valid JSON).*an adapter is a folder that PEFT has saved"):
        LoraModel(Checkpoint(model), config.parent)


# --- several models ---------------------------------------------------------------------------------------------


def test_models_of_another_vocabulary_are_refused_by_both_names(tmp_path: Path) -> None:
    new_checkpoint(tmp_path / "small")
    new_checkpoint(tmp_path / "wide", vocabulary=72)
    with pytest.raises(SourceError, match=r"small and wide have different vocabularies: .*64, 16.*72, 16"):
        Sources.open(references("small", "wide"), tmp_path)


def test_models_of_another_width_are_refused_by_both_names(tmp_path: Path) -> None:
    new_checkpoint(tmp_path / "small")
    new_checkpoint(tmp_path / "wide", hidden=32)
    with pytest.raises(SourceError, match=r"small and wide have different (shapes|vocabularies): .*16.*32"):
        Sources.open(references("small", "wide"), tmp_path)


@pytest.mark.parametrize("order", [("shallow", "deep"), ("deep", "shallow")])
def test_models_of_another_depth_are_refused_by_both_names(order: tuple[str, str], tmp_path: Path) -> None:
    new_checkpoint(tmp_path / "shallow")
    new_checkpoint(tmp_path / "deep", layers=5)
    with pytest.raises(SourceError, match=r"has [45] layers, (deep|shallow) [45] \(num_hidden_layers\)"):
        Sources.open(references(*order), tmp_path)


def test_a_model_with_a_head_of_its_own_does_not_fit_one_with_a_tied_head(tmp_path: Path) -> None:
    new_checkpoint(tmp_path / "tied", tied=True)
    new_checkpoint(tmp_path / "untied")
    with pytest.raises(SourceError, match=r"untied has an output head .* that is no copy"):
        Sources.open(references("tied", "untied"), tmp_path)


def test_models_of_another_architecture_are_refused_by_their_types(tmp_path: Path) -> None:
    new_checkpoint(tmp_path / "one")
    new_checkpoint(tmp_path / "two", family="qwen2")
    with pytest.raises(SourceError, match=r"different architectures: model_type is 'llama' in one, 'qwen2' in two"):
        Sources.open(references("one", "two"), tmp_path)


def test_other_shapes_are_explained_by_the_keys_of_both_configs(tmp_path: Path) -> None:
    new_checkpoint(tmp_path / "small", vocabulary=32)
    new_checkpoint(tmp_path / "wide", vocabulary=32, hidden=32)
    with pytest.raises(SourceError, match=r"different shapes: .*\(hidden_size: 16 in small, 32 in wide"):
        Sources.open(references("small", "wide"), tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop(QUERY), "{0} has the tensor {2}, {1} does not; {1} has it in other layers, .* incomplete"),
        (lambda w: w.update({"score.weight": torch.ones(2)}), "{1} has the tensor score.weight, {0} does not"),
        (lambda w: w.update({"x.SCB": torch.ones(2)}), "{1} is quantized"),
        (lambda w: w.update({"x.lora_A.weight": torch.ones(2)}), "{1} has a LoRA adapter in its weights"),
        (
            lambda w: [w.update({f"base_model.model.{name}": w.pop(name)}) for name in [*w]],
            "{1}: the name of every tensor begins with 'base_model.model.'",
        ),
    ],
)
@pytest.mark.parametrize("changed", ["one", "two"])
def test_tensors_of_one_model_only_are_refused_with_the_probable_cause(
    change: Any, said: str, changed: str, model: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        copy_of(model, tmp_path / name)
    weights = weights_of(tmp_path / changed)
    change(weights)
    save_file(weights, tmp_path / changed / "model.safetensors", {"format": "pt"})
    other = "two" if changed == "one" else "one"
    with pytest.raises(SourceError, match=said.format(other, changed, QUERY)):
        Sources.open(references("one", "two"), tmp_path)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (5, "says num_hidden_layers: 5, but no weight belongs to layer 4"),
        (3, "says num_hidden_layers: 3, but there are weights of layer 3, which would be lost"),
        (0, "num_hidden_layers is 0; it must be the number of layers"),
        ("4", "num_hidden_layers is '4'; it must be the number of layers"),
    ],
)
@pytest.mark.parametrize("changed", ["one", "two"])
def test_layers_that_config_and_weights_disagree_about_are_refused(
    value: Any, said: str, changed: str, model: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        copy_of(model, tmp_path / name)
    config = tmp_path / changed / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": value}))
    with pytest.raises(SourceError, match=f"{changed}: config.json.*{said}"):
        Sources.open(references("one", "two"), tmp_path)


def test_weights_without_layers_are_refused(model: Path, tmp_path: Path) -> None:
    weights = weights_of(copy_of(model, tmp_path / "one"))
    renamed = {re.sub(r"\.layers\.(\d+)", r".layer\1", name): weight for name, weight in weights.items()}
    save_file(renamed, tmp_path / "one" / "model.safetensors")
    with pytest.raises(SourceError, match="one: none of its weights belongs to a layer by its name"):
        Sources.open(references("one"), tmp_path)


def test_complex_numbers_are_refused(tmp_path: Path) -> None:
    save_file({"model.rope": torch.ones(2, dtype=torch.complex64)}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"model\.rope holds complex numbers"):
        Checkpoint(tmp_path)


def test_layers_for_multi_token_prediction_are_no_layers_too_many(model: Path, tmp_path: Path) -> None:
    config = copy_of(model, tmp_path / "one") / "config.json"
    changes = {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    (one,) = references("one")
    assert Sources.open([one], tmp_path).depth(one) == 3


def test_models_that_fit_are_opened_once_each(model: Path, adapter: Path) -> None:
    plain, adapted = references("model", f"model+{adapter}")
    sources = Sources.open([plain, adapted], model.parent)
    assert sources[plain] is sources[ModelReference.parse("model")]
    source = sources[adapted]
    assert isinstance(source, LoraModel)
    assert source.model is sources[plain]


def test_a_model_is_opened_once_whatever_path_leads_to_it(model: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "here")
    (tmp_path / "link").symlink_to("here")
    names = ("here", str(tmp_path / "here"), f"link+{adapter}", f"{tmp_path}/../{tmp_path.name}/here+{adapter}")
    known = references(*names)
    sources = Sources.open(known, tmp_path)
    first = sources[known[0]].tensor(KEY)
    assert all(sources[each].tensor(KEY) is first for each in known)
    weight = sources[known[2]].weight(QUERY)
    assert isinstance(weight, LowRank)
    assert weight.origin is sources[known[0]].tensor(QUERY)


@pytest.mark.parametrize("same", [True, False])
def test_a_stored_head_is_left_out_where_it_is_the_tied_embeddings(same: bool, tmp_path: Path) -> None:
    folder = new_checkpoint(tmp_path / "model", tied=True)
    weights = weights_of(folder)
    head = weights["model.embed_tokens.weight"].clone()
    head[-1, -1] += 0.0 if same else 1.0
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    (one,) = references("model")
    sources = Sources.open([one], tmp_path)
    assert ("lm_head.weight" in sources[one].shapes) != same
    assert ("lm_head.weight" in sources.left_out(one)) == same


def test_the_config_comes_from_the_models_folder_and_is_named_when_it_cannot_be_read(
    model: Path, tmp_path: Path
) -> None:
    copy_of(model, tmp_path / "copy")
    (reference,) = references("copy")
    assert Sources(tmp_path).config(reference)["num_hidden_layers"] == 4
    (tmp_path / "copy" / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json is missing; copy must be a folder"):
        Sources(tmp_path).config(reference)


def test_a_checksum_tells_models_and_adapters_apart_and_is_the_same_for_a_copy(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    copy_of(model, tmp_path / "model")
    new_checkpoint(tmp_path / "other", seed=2)
    sources = Sources(tmp_path)
    one, copy, other, adapted = references(str(model), "model", "other", f"model+{adapter}")
    assert sources.checksum(one) == sources.checksum(copy)
    assert len({sources.checksum(reference) for reference in (one, other, adapted)}) == 3


def test_a_changed_byte_anywhere_in_the_weights_changes_the_checksum_and_so_does_the_adapters_config(
    model: Path, adapter: Path, tmp_path: Path
) -> None:
    """Not that of version 0.1, which is of the ends of files: old logs are compared by it."""
    large = tmp_path / "large"
    large.mkdir()
    save_file({"weight": torch.zeros(1 << 20)}, large / "model.safetensors")
    copy_of(adapter, tmp_path / "adapter")
    one, adapted = references("large", f"{model}+adapter")
    sources = Sources(tmp_path)
    before, old = sources.checksum(one), sources.checksum(one, "ab")
    assert before.startswith("sha256:")
    assert sources.checksum(one, before) == before
    with (large / "model.safetensors").open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"1")
    assert sources.checksum(one) != before
    assert sources.checksum(one, old) == old
    before = sources.checksum(adapted)
    shutil.rmtree(tmp_path / "adapter")
    changed_adapter(adapter, tmp_path / "adapter", lora_alpha=99)
    assert sources.checksum(adapted) != before


def test_a_file_is_read_once_as_long_as_it_is_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(tmp_path / "cache"))
    file = tmp_path / "file"
    file.write_bytes(b"a" * 1000)
    (before,) = content_checksums([file]).values()
    assert (before, unread_bytes([file])) == (hashlib.sha256(b"a" * 1000).hexdigest(), 0)
    with monkeypatch.context() as patch:
        patch.setattr(files, "read_sha256", lambda _: pytest.fail("read again"))
        assert content_checksums([file]) == {file: before}
    (tmp_path / "other").write_bytes(b"b" * 1000)
    os.utime(tmp_path / "other", ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    (tmp_path / "other").replace(file)  # of the same size and age
    assert unread_bytes([file]) == 1000
    assert content_checksums([file]) != {file: before}


def test_files_are_remembered_while_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "THREADS", 1)
    monkeypatch.setattr(files, "WRITTEN_EVERY", 0.0)
    first, last = tmp_path / "first", tmp_path / "last"
    for file in (first, last):
        file.write_bytes(b"a" * 1000)
    real = files.read_sha256

    def read(file: Path) -> str:
        if file == last:
            until(lambda: not unread_bytes([first]))
        return real(file)

    monkeypatch.setattr(files, "read_sha256", read)
    assert [*content_checksums([first, last])] == [first, last]


def test_a_file_that_cannot_be_read_leaves_the_others_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEVO_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "THREADS", 1)
    first = tmp_path / "first"
    first.write_bytes(b"a" * 1000)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        content_checksums([first, tmp_path / "folder"])
    assert unread_bytes([first]) == 0


@pytest.mark.parametrize("torn", ["", "[]", "{", '{"x": 1}'])
def test_without_a_cache_that_can_be_read_or_written_checksums_are_the_same(
    torn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"a")
    wanted = {file: hashlib.sha256(b"a").hexdigest()}
    monkeypatch.setenv("LLMEVO_HOME", str(file))  # no folder
    assert content_checksums([file]) == wanted
    monkeypatch.setenv("LLMEVO_HOME", str(tmp_path))
    (tmp_path / "checksums.json").write_text(torn)
    assert content_checksums([file]) == wanted == content_checksums([file])


def test_a_file_of_the_cache_may_be_written_by_many_at_a_time() -> None:
    content = b"x" * 200_000
    with ThreadPoolExecutor(8) as pool:
        for place in range(5):
            found = [*pool.map(lambda _, p=place: kept_file("texts", f"{p}.json", content), range(16))]
            assert {file.read_bytes() for file in found} == {content}
    assert not [*(cache_folder() / "texts").glob(".*")]
