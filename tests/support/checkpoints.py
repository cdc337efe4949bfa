"""Tiny checkpoints to merge: random weights, a few kilobytes each, saved as the real ones are."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from llmevo.models.checkpoints import Source
from llmevo.models.references import ModelReference

Family = Literal["llama", "qwen2"]
T = TypeVar("T")


def quietly(action: Callable[[], T]) -> T:
    """Do it without warnings: those of libraries that are none of our making."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


def mergekit(module: str) -> Any:
    """A module of mergekit, the oracle that merges are checked against."""
    return quietly(lambda: importlib.import_module(f"mergekit.{module}"))


def new_model(
    seed: int, family: Family = "llama", hidden: int = 16, layers: int = 4, vocabulary: int = 64, tied: bool = False
) -> Any:
    """A model with random weights, the same for the same arguments; its norms and biases are random as well."""
    size: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }
    made: Any = LlamaForCausalLM(LlamaConfig(**size)) if family == "llama" else Qwen2ForCausalLM(Qwen2Config(**size))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.copy_(torch.randn(weight.shape, generator=random) * 0.05 + (1.0 if "norm" in name else 0.0))
    return made


def new_checkpoint(
    folder: Path,
    seed: int = 0,
    *,
    family: Family = "llama",
    hidden: int = 16,
    layers: int = 4,
    vocabulary: int = 64,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    shard: str | None = None,
) -> Path:
    """Save a random model; with `shard` (such as "10KB") in files of at most that size."""
    made = new_model(seed, family, hidden, layers, vocabulary, tied).to(dtype)
    made.save_pretrained(folder, max_shard_size=shard or "1GB")
    return folder


def new_adapter(folder: Path, model: Path, seed: int = 0, **config: Any) -> Path:
    """Save a LoRA adapter for a model, with random factors; `config` goes to PEFT's LoraConfig."""
    given: dict[str, Any] = {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": False,
        **config,
    }
    adapted: Any = quietly(lambda: get_peft_model(LlamaForCausalLM.from_pretrained(model), LoraConfig(**given)))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=random) * 0.1)
    quietly(lambda: adapted.save_pretrained(folder))
    return folder


def merged_by_peft(model: Path, adapter: Path) -> dict[str, Tensor]:
    """The weights of a model with its adapter merged in by PEFT, in float32."""
    plain: Any = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded: Any = quietly(lambda: PeftModel.from_pretrained(plain, adapter))
    return dict(loaded.merge_and_unload().state_dict())


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor, to compare where 0 and -0 must differ."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Fail unless both have the same names, types and bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(bits(actual[name]), bits(tensor)), name


def assert_near(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-5, atol: float = 1e-7
) -> None:
    """Fail unless both have the same names and nearly the same values."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def references(*names: str) -> list[ModelReference]:
    return [ModelReference.parse(name) for name in names]


def tensors(source: Source) -> dict[str, Tensor]:
    """All weights of a model, by their names in its checkpoint."""
    return {name: source.tensor(name) for name in source.shapes}
