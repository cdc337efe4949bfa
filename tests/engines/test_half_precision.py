"""Products of half-precision matrices on CPUs without instructions for them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from llmevo.engines import half_precision
from llmevo.engines.half_precision import FEW_ROWS, Float32Products, fastest_products
from support.families import new_family
from support.family_checks import loaded, logits_of

CPU = torch.device("cpu")


@pytest.fixture
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has no instructions for half precision, whatever this machine has."""
    monkeypatch.setattr(half_precision, "has_instructions", lambda dtype: dtype == torch.float32)


def halves(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_is_the_rounded_product_of_float32(dtype: torch.dtype) -> None:
    a, weight, bias = halves(40, 64, dtype=dtype), halves(32, 64, dtype=dtype), halves(32, dtype=dtype)
    with Float32Products():
        made = [functional.linear(a, weight, bias), torch.addmm(bias, a, weight.T), a @ weight.T]
    exact = (a.double() @ weight.double().T).float()
    assert torch.equal(made[0], functional.linear(a.float(), weight.float(), bias.float()).to(dtype))
    assert torch.equal(made[1], torch.addmm(bias.float(), a.float(), weight.float().T).to(dtype))
    assert all(of.dtype == dtype for of in made)
    for of, wanted in zip(made, (exact + bias.float(), exact + bias.float(), exact), strict=True):
        assert torch.allclose(of.float(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_attention_takes_masks_of_numbers_and_of_truth_values() -> None:
    keys = halves(2, 3, 12, 16)
    seen = torch.ones(12, 12).tril().bool()
    mask = torch.zeros(12, 12, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
    with Float32Products():
        by_numbers = functional.scaled_dot_product_attention(keys, keys, keys, attn_mask=mask)
        by_truth = functional.scaled_dot_product_attention(keys, keys, keys, attn_mask=seen)
    wide = keys.float()
    wanted = functional.scaled_dot_product_attention(wide, wide, wide, attn_mask=seen).bfloat16()
    assert torch.equal(by_truth, wanted)
    assert torch.equal(by_numbers, wanted)


class ProductTypes(TorchDispatchMode):
    """Collects the types of the matrices that PyTorch multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(word in str(func) for word in ("mm", "linear", "attention")):
            self.types += [of.dtype for of in args if isinstance(of, Tensor) and of.is_floating_point()]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments that were converted to float32, if tensors of half precision."""
    own, found = vars(half_precision)["_widened"], list[Any]()
    monkeypatch.setattr(half_precision, "_widened", lambda of: (found.append(of), own(of))[1])
    return found


def test_few_rows_and_other_types_are_left_alone(widened: list[Any]) -> None:
    with Float32Products():
        functional.linear(halves(FEW_ROWS, 64), halves(32, 64))
        functional.linear(torch.ones(40, 64), torch.ones(32, 64))
        assert not widened
        functional.linear(halves(FEW_ROWS + 1, 64), halves(32, 64))
        assert len(widened) == 2
        torch.addmm(halves(32), halves(FEW_ROWS + 1, 64), halves(64, 32))
    assert len(widened) == 5


def test_a_cpu_with_instructions_keeps_its_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "has_instructions", lambda _: True)
    assert not isinstance(fastest_products(CPU, torch.bfloat16), Float32Products)
    assert not isinstance(fastest_products(torch.device("cuda"), torch.bfloat16), Float32Products)


def test_builds_without_onednn_have_no_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert half_precision.has_instructions(torch.float32)
    assert not half_precision.has_instructions(torch.bfloat16)
    assert isinstance(fastest_products(CPU, torch.float16), Float32Products)


@pytest.mark.usefixtures("without_instructions")
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BLOOM", "Mixtral"])
def test_all_products_of_a_model_are_in_float32(name: str, tmp_path: Path, widened: list[Any]) -> None:
    folder = new_family(tmp_path, name) / "base"
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = loaded(folder, torch.bfloat16)
    with Float32Products():
        wanted = logits_of(plain)
    widened.clear()
    with ProductTypes() as seen:
        assert torch.equal(logits_of(model), wanted)
    assert widened
    assert {*seen.types} == {torch.float32}
    widened.clear()
    logits_of(plain)
    assert not widened


@pytest.mark.usefixtures("without_instructions")
def test_a_pass_that_fails_leaves_nothing_behind(tmp_path: Path, widened: list[Any]) -> None:
    model = loaded(new_family(tmp_path, "Llama") / "base", torch.bfloat16)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    widened.clear()
    torch.matmul(halves(40, 64), halves(64, 40))
    assert not widened
