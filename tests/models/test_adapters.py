"""Adapters of every kind as sources: each equals what PEFT merges in float32, and what is not exact is refused."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from llmevo.errors import SourceError
from llmevo.models.adapters import LoraModel
from llmevo.models.checkpoints import Checkpoint, LowRank
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from support.checkpoints import assert_near, new_checkpoint, quietly, weights_of
from support.quantized import change_config

QUERY = "model.layers.1.self_attn.q_proj"
EMBEDDINGS = "model.embed_tokens"
TARGETS = ["q_proj", "down_proj"]


def lora(**config: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False, **config})


KINDS: dict[str, Callable[[], Any]] = {
    "plain": lora,
    "rslora, ranks by module": lambda: lora(
        use_rslora=True, rank_pattern={"down_proj": 4}, alpha_pattern={"q_proj": 1}
    ),
    "dora": lambda: lora(use_dora=True),
    "dora of embeddings": lambda: lora(use_dora=True, target_modules=["q_proj", "embed_tokens"]),
    "all biases": lambda: lora(bias="all"),
    "biases of its layers": lambda: lora(bias="lora_only", target_modules=["q_proj"]),
    "lora with biases": lambda: lora(lora_bias=True, target_modules=["q_proj"]),
    "embeddings and head": lambda: lora(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "saved modules": lambda: lora(modules_to_save=["lm_head", "embed_tokens", "norm"]),
    "rows of embeddings": lambda: lora(trainable_token_indices=[1, 5]),
    "rows of embeddings and head": lambda: lora(trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [2]}),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_alpha=3, target_modules=TARGETS),
    "loha": lambda: peft.LoHaConfig(
        r=2, alpha=3, target_modules=TARGETS, rank_pattern={"q_proj": 3}, init_weights=False
    ),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS, init_weights=False),
    "lokr, both low-rank": lambda: peft.LoKrConfig(
        r=1, alpha=3, target_modules=TARGETS, decompose_both=True, decompose_factor=4, init_weights=False
    ),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": lambda: peft.VeraConfig(r=3, target_modules=["q_proj", "k_proj"]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[0, 63], target_modules=["embed_tokens"]),
}


def new_peft(folder: Path, model: Path, config: Any, binary: bool = False) -> Path:
    """Save an adapter of any kind with random numbers in all that was trained."""
    adapted: Any = quietly(lambda: get_peft_model(AutoModelForCausalLM.from_pretrained(model), config))
    random = torch.Generator().manual_seed(4)
    trained = ("lora_", "hada_", "lokr_", "ia3_", "vera_lambda", "modules_to_save", "trainable_tokens", "ln_tuning")
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if any(part in name for part in trained) or (weight.requires_grad and name.endswith("bias")):
                weight.add_(torch.randn(weight.shape, generator=random) * 0.1)
    quietly(lambda: adapted.save_pretrained(folder, safe_serialization=not binary))
    return folder


def merged(model: Path, adapter: Path) -> dict[str, Tensor]:
    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded: Any = quietly(lambda: PeftModel.from_pretrained(plain, adapter))
    return dict(quietly(lambda: loaded.merge_and_unload()).state_dict())


def tensors(source: LoraModel) -> dict[str, Tensor]:
    return {name: source.tensor(name) for name in source.shapes}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_checkpoint(tmp_path_factory.mktemp("models") / "model", seed=1, family="qwen2", layers=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("adapters")

    def make(kind: str) -> Path:
        folder = root / re.sub(r"\W+", "-", kind)
        return folder if folder.exists() else new_peft(folder, model, KINDS[kind]())

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_equals_what_peft_merges(kind: str, model: Path, saved: Callable[[str], Path]) -> None:
    adapter, base = saved(kind), Checkpoint(model)
    adapted = LoraModel(base, adapter)
    assert_near(tensors(adapted), merged(model, adapter), rtol=1e-5, atol=2e-6)
    assert adapted.shapes == base.shapes
    assert any(not torch.equal(adapted.tensor(name), base.tensor(name)) for name in base.shapes)
    assert all(adapted.dtype(name) == torch.float32 for name in base.shapes)


@pytest.mark.parametrize("kind", ["plain", "embeddings and head", "adalora", "vera"])
def test_a_low_rank_change_stays_low_rank_over_the_models_own_weight(
    kind: str, model: Path, saved: Callable[[str], Path]
) -> None:
    base = Checkpoint(model)
    adapted = LoraModel(base, saved(kind))
    for name in (QUERY, EMBEDDINGS) if "embeddings" in kind else (QUERY,):
        weight = adapted.weight(f"{name}.weight")
        assert isinstance(weight, LowRank)
        assert weight.origin.data_ptr() == base.tensor(f"{name}.weight").data_ptr()


def test_a_layer_of_gpt2_has_rows_and_columns_exchanged(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    quietly(lambda: GPT2LMHeadModel(config).save_pretrained(tmp_path / "model"))
    for place, more in enumerate(({}, {"use_dora": True})):
        given = lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **more)
        adapter = new_peft(tmp_path / str(place), tmp_path / "model", given)
        adapted = LoraModel(Checkpoint(tmp_path / "model"), adapter)
        expected = {
            name: weight for name, weight in merged(tmp_path / "model", adapter).items() if "lm_head" not in name
        }
        assert_near(tensors(adapted), {name: expected[name] for name in adapted.shapes}, atol=2e-6)


MOE: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["stored as one", "stored by expert"])
def test_experts_are_adapted_each_by_its_part_of_the_factors(kind: str, tmp_path: Path) -> None:
    made: Any = (
        GptOssForCausalLM(GptOssConfig(**MOE, num_local_experts=3, num_experts_per_tok=2))
        if kind == "stored as one"
        else Qwen3MoeForCausalLM(Qwen3MoeConfig(**MOE, moe_intermediate_size=24, num_experts=3, num_experts_per_tok=2))
    )
    quietly(lambda: made.save_pretrained(tmp_path / "model"))
    target = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    given = lora(target_modules=["q_proj"], target_parameters=target, rank_pattern={"down_proj": 3})
    adapter = new_peft(tmp_path / "adapter", tmp_path / "model", given)
    adapted = LoraModel(Checkpoint(tmp_path / "model"), adapter)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    loaded: Any = quietly(lambda: PeftModel.from_pretrained(plain, adapter))
    quietly(lambda: loaded.merge_and_unload().save_pretrained(tmp_path / "merged"))
    expected = weights_of(tmp_path / "merged")
    assert_near(tensors(adapted), expected, atol=2e-6)
    changed = [n for n in expected if "experts" in n and not torch.equal(adapted.tensor(n), adapted.model.tensor(n))]
    assert len(changed) == (2 if kind == "stored as one" else 9)
