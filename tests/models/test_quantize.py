"""Rounding to the formats of servers: the same bits as the packages that write them."""

import importlib
import warnings
from typing import Any

import gguf
import pytest
import torch
from gguf import quants
from torch import Tensor

from llmevo.models.quantize import Quantizer, dequantize, ggml_bytes, quantize, quantizer, rounded

TYPES = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}


def compressed_tensors() -> tuple[Any, Any]:
    """The package comes with vLLM."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compiler, which it imports
        pytest.importorskip("compressed_tensors")
        quantization = importlib.import_module("compressed_tensors.quantization")
        return quantization, importlib.import_module("compressed_tensors.quantization.lifecycle.forward")


def hard_weight(dtype: torch.dtype) -> Tensor:
    """Ties of size, exact halves, a block and a row of zeros, large and tiny numbers."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[0] = 0
    weight[1, :32] = 0
    weight[2] = torch.randint(-3, 4, (256,), generator=torch.Generator().manual_seed(1)) / 2
    weight[3, :32] = torch.arange(32) - 15.5
    weight[4] *= 1e4
    weight[5] *= 1e-6
    weight[6, 5], weight[6, 9] = 1.0, -1.0
    weight[7, 5], weight[7, 9] = -1.0, 1.0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", TYPES)
def test_blocks_have_the_bytes_of_gguf(stored: str, dtype: torch.dtype) -> None:
    weight = hard_weight(dtype)
    expected = quants.quantize(weight.float().numpy(), TYPES[stored])
    parts = quantize(weight, stored)
    assert torch.equal(ggml_bytes(parts, stored), torch.from_numpy(expected))
    back = torch.from_numpy(quants.dequantize(expected, TYPES[stored]))
    assert torch.equal(dequantize(parts, stored, torch.float32), back)
    assert torch.equal(rounded(weight, stored), back.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_has_the_bits_of_compressed_tensors(dtype: torch.dtype) -> None:
    of, forward = compressed_tensors()
    channel: Any = of.QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True, dynamic=False)
    weight = hard_weight(dtype)
    scales, zeros = of.utils.calculate_qparams(weight.amin(-1, True), weight.amax(-1, True), channel)
    expected = forward.quantize(weight, scales, zeros, channel, torch.float8_e4m3fn)
    codes, own = quantize(weight, "fp8")
    assert own is not None
    assert torch.equal(own, scales)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(rounded(weight, "fp8"), forward.dequantize(expected, scales, args=channel))


@pytest.mark.parametrize("stored", ["q8_0", "q4_0", "fp8"])
def test_rounding_in_pieces_and_by_expert_is_rounding(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = torch.stack([hard_weight(torch.bfloat16), hard_weight(torch.bfloat16).flip(0)])
    expected = [dequantize(quantize(expert, stored), stored, torch.bfloat16) for expert in experts]
    monkeypatch.setattr("llmevo.models.quantize.TOGETHER", 700)
    assert torch.equal(rounded(experts, stored), torch.stack(expected))
    assert torch.equal(rounded(experts[1].mT.contiguous().mT, stored), expected[1])
    assert not torch.equal(experts[0], expected[0])


def test_the_error_is_within_half_a_step() -> None:
    weight = hard_weight(torch.float32)[8:]
    sizes = weight.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(-2)
    for stored, step in (("q8_0", 1 / 127), ("q4_0", 1 / 8)):
        # The step is itself rounded to float16; the largest number opposite in sign is cut off at 7 of 8 steps.
        limit = sizes * step * (1 if stored == "q4_0" else 0.5) + sizes * 2**-10
        assert ((rounded(weight, stored) - weight).abs() <= limit).all()
    assert (
        (rounded(weight, "fp8") - weight).abs() <= weight.abs() / 16 + weight.abs().amax(-1, True) / 448 / 512
    ).all()


@pytest.mark.parametrize(
    ("name", "shape", "q8_0", "q4_0", "fp8"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), "q8_0", "q4_0", "fp8"),
        ("model.layers.0.self_attn.q_proj.weight", (64, 48), "f16", "f16", "fp8"),
        ("model.layers.0.self_attn.q_proj.bias", (64,), None, None, None),
        ("model.layers.0.mlp.gate_proj.weight", (64, 64), "q8_0", "q4_0", "fp8"),
        ("model.layers.0.mlp.gate.weight", (8, 64), None, None, None),
        ("model.layers.0.block_sparse_moe.gate.weight", (8, 64), None, None, None),
        ("model.layers.0.mlp.experts.3.down_proj.weight", (64, 96), "q8_0", "q4_0", "fp8"),
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 192, 64), "q8_0", "q4_0", "fp8"),
        ("model.layers.0.block_sparse_moe.input_linear.weight", (4, 192, 64), "q8_0", "q4_0", "fp8"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 192), None, None, None),
        ("model.layers.0.linear_attn.conv1d.weight", (64, 1, 4), None, None, None),
        ("model.layers.0.mixer.A_log", (64, 16), None, None, None),
        ("model.layers.0.input_layernorm.weight", (64,), None, None, None),
        ("model.embed_tokens.weight", (320, 64), "q8_0", "q4_0", None),
        ("model.visual.blocks.0.attn.qkv.weight", (192, 64), None, None, None),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.weight", (192, 64), None, None, None),
        ("model.language_model.layers.0.mlp.up_proj.weight", (64, 64), "q8_0", "q4_0", "fp8"),
        ("transformer.wpe.weight", (64, 64), None, None, None),
        ("lm_head.weight", (320, 64), "q8_0", "q8_0", None),
    ],
)
def test_which_tensors_are_quantized(
    name: str, shape: tuple[int, ...], q8_0: str | None, q4_0: str | None, fp8: str | None
) -> None:
    assert [Quantizer(of).stored(name, shape) for of in ("q8_0", "q4_0", "fp8")] == [q8_0, q4_0, fp8]


def test_embeddings_that_are_the_head_are_stored_as_one() -> None:
    name, shape = "model.embed_tokens.weight", (320, 64)
    assert quantizer("q4_0", {name: shape}, {}).stored(name, shape) == "q8_0"
    both = {name: shape, "lm_head.weight": shape}
    assert quantizer("q4_0", both, {}).stored(name, shape) == "q4_0"
    assert quantizer("q4_0", both, {"tie_word_embeddings": True}).stored(name, shape) == "q8_0"


def test_matrices_of_inputs_and_outputs_are_rounded_along_the_inputs() -> None:
    weight = hard_weight(torch.float32)  # (64 outputs, 256 inputs)
    gpt2 = quantizer("q8_0", {}, {"model_type": "gpt2"})
    name = "h.0.attn.c_attn.weight"
    assert torch.equal(gpt2.rounded(name, weight.mT), rounded(weight, "q8_0").mT)
    parts = gpt2.parts(name, weight.mT)
    assert parts is not None
    assert torch.equal(parts.codes, quantize(weight, "q8_0").codes)


@pytest.mark.parametrize(
    ("up", "down", "transposed"),
    [
        ((4, 192, 64), (4, 64, 96), False),
        ((4, 64, 192), (4, 96, 64), True),
        ((4, 64, 64), (4, 64, 32), False),
        ((4, 64, 64), (4, 32, 64), True),
    ],
)
def test_stacks_of_experts_are_rounded_along_their_inputs(
    up: tuple[int, ...], down: tuple[int, ...], transposed: bool
) -> None:
    shapes = {"layers.0.mlp.experts.gate_up_proj": up, "layers.0.mlp.experts.down_proj": down}
    found = quantizer("q8_0", shapes, {"hidden_size": 64})
    assert [found.is_transposed(name, shape) for name, shape in shapes.items()] == [transposed] * 2
