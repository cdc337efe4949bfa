"""Quantized checkpoints: tiny, written as the libraries write them, with what those libraries read in them."""

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from support.checkpoints import new_checkpoint, quietly, weights_of

Parts = dict[str, Tensor]
"""The tensors of one quantized weight, by what follows its name without `weight`."""


def library(module: str) -> Any:
    """A module of compressed-tensors, the oracle; the test is skipped where it is not installed."""
    pytest.importorskip("compressed_tensors")
    return quietly(lambda: importlib.import_module(f"compressed_tensors.{module}"))


def compressed(format: str, weights: Mapping[str, Any], **more: Any) -> tuple[dict[str, Any], Any]:
    """A `quantization_config` of compressed-tensors, and the function that quantizes one weight with it."""
    scheme = library("quantization").QuantizationScheme(targets=["Linear"], weights=dict(weights), **more)
    compressor = library("compressors").BaseCompressor.get_value_from_registry(format)
    config = {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": dict(weights), "format": format}},
    }

    def quantize(weight: Tensor) -> tuple[Parts, Tensor]:
        state = {"weight": weight, **_scales(weight, scheme.weights)}
        with torch.compiler.set_stance("force_eager"):
            packed = quietly(lambda: compressor.compress(state, scheme))
        if "fp4" not in format:
            return packed, compressor.decompress(packed, scheme)["weight"]
        # Its own `decompress` rounds the scales to bfloat16.
        unpack = library("compressors.nvfp4.helpers").unpack_fp4_from_uint8
        numbers, scale = unpack(packed["weight_packed"], *weight.shape, torch.float32), packed["weight_scale"]
        scale = library("compressors.mx_utils").decompress_mx_scale(scale) if scale.dtype == torch.uint8 else scale
        dequantize = library("quantization.lifecycle.forward").dequantize
        return packed, dequantize(numbers, scale.float(), global_scale=packed.get("weight_global_scale"))

    return config, quantize


def _scales(weight: Tensor, args: Any) -> Parts:
    """Scales, and zero points, by the largest magnitude of each group, as observers make them."""
    largest = {"int": 2 ** (args.num_bits - 1) - 1, "float": 448.0 if args.num_bits == 8 else 6.0}[args.type]
    rows, columns = weight.shape
    if args.strategy == "tensor":
        groups = weight.reshape(1, 1, -1)
    elif args.strategy == "channel":
        groups = weight.reshape(rows, 1, -1)
    elif args.strategy == "block":
        high, wide = args.block_structure
        groups = weight.reshape(rows // high, high, columns // wide, wide).transpose(1, 2).flatten(2)
    else:
        groups = weight.reshape(rows, columns // args.group_size, -1)
    scale = groups.abs().amax(-1) / largest
    if args.strategy == "tensor":
        scale = scale.reshape(1)
    found = {"weight_scale": scale}
    if args.strategy == "tensor_group":  # NVFP4
        found["weight_global_scale"] = torch.tensor([448.0 * 6.0]) / weight.abs().max()
        found["weight_scale"] = (scale * found["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    elif args.type == "float" and args.group_size == 32:  # MXFP4 and MXFP8: powers of 2
        found["weight_scale"] = torch.exp2(torch.ceil(torch.log2(scale)))
    if not args.symmetric:
        low, high = groups.amin(-1), groups.amax(-1)
        found["weight_scale"] = (high - low) / (2**args.num_bits - 1)
        zero = torch.round(-(2 ** (args.num_bits - 1)) - low / found["weight_scale"])
        found["weight_zero_point"] = zero.clamp(-(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1).to(
            torch.int8
        )
    if args.actorder == "group":
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(3))
        found["weight_g_idx"] = (torch.arange(columns) // args.group_size)[order].to(torch.int32)
    return found


def fp8_blocks(weight: Tensor, block: tuple[int, int] = (32, 16)) -> tuple[Parts, Tensor]:
    """FP8 as DeepSeek and transformers save it, read by transformers."""
    fp8 = importlib.import_module("transformers.integrations.finegrained_fp8").Fp8Dequantize(None)
    (rows, columns), (high, wide) = weight.shape, block
    scale = weight.reshape(rows // high, high, columns // wide, wide).abs().amax((1, 3)) / 448
    numbers = (weight / scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)).to(torch.float8_e4m3fn)
    return {"weight": numbers, "weight_scale_inv": scale}, fp8._dequantize_one(numbers, scale, torch.float32)


def fp8_tensor(weight: Tensor) -> tuple[Parts, Tensor]:
    """FP8 as ModelOpt saves it: one scale a weight, one of the activations, two of the cache."""
    scale = weight.abs().max() / 448
    numbers = (weight / scale).to(torch.float8_e4m3fn)
    one = torch.tensor(1.0)
    return (
        {"weight": numbers, "weight_scale": scale, "input_scale": one, "k_scale": one.clone(), "v_scale": one.clone()},
        numbers.float() * scale,
    )


def modelopt_nvfp4(weight: Tensor) -> tuple[Parts, Tensor]:
    """NVFP4 as ModelOpt saves it, converted and read by compressed-tensors."""
    arguments = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    parts, expected = compressed("nvfp4-pack-quantized", arguments)[1](weight)
    whole = 1 / parts["weight_global_scale"]
    return {
        "weight": parts["weight_packed"],
        "weight_scale": parts["weight_scale"],
        "weight_scale_2": whole[0],
        "input_scale": torch.tensor(0.5),
    }, expected


def _packed_rows(numbers: Tensor, bits: int) -> Tensor:
    """Consecutive rows in one int32, the first in the low bits."""
    several = 32 // bits
    shifts = torch.arange(several)[None, :, None] * bits
    packed = (numbers.long().reshape(-1, several, numbers.shape[1]) << shifts).sum(1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def _rounded(weight: Tensor, bits: int, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, zero points and scales of (input, output) weights, for the group of each input channel."""
    count = int(groups.max()) + 1
    low = torch.stack([weight[groups == g].amin(0) for g in range(count)]).clamp(max=0)
    high = torch.stack([weight[groups == g].amax(0) for g in range(count)]).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).to(torch.float16)
    zero = torch.round(-low / scale.float()).clamp(0, 2**bits - 1)
    numbers = torch.round(weight / scale[groups].float() + zero[groups]).clamp(0, 2**bits - 1)
    return numbers, zero, scale


def gptq(bits: int, version: int = 1, by_activation: bool = False, size: int = 16) -> Callable[[Tensor], Any]:
    """GPTQ as AutoGPTQ and GPTQModel save it; zero points of the first version are stored less 1."""

    def quantize(weight: Tensor) -> tuple[Parts, Tensor]:
        turned = weight.T.contiguous()
        groups = torch.arange(len(turned)) // size
        if by_activation:
            groups = groups[torch.randperm(len(turned), generator=torch.Generator().manual_seed(1))]
        numbers, zero, scale = _rounded(turned, bits, groups)
        stored = (zero - 1).remainder(2**bits) if version == 1 else zero
        parts = {
            "qweight": _packed_rows(numbers, bits),
            "qzeros": _packed_rows(stored.T.contiguous(), bits).T.contiguous(),
            "scales": scale,
            "g_idx": groups.to(torch.int32),
        }
        return parts, ((numbers - zero[groups]) * scale[groups].float()).T

    return quantize


def awq(weight: Tensor, size: int = 16) -> tuple[Parts, Tensor]:
    """AWQ as AutoAWQ saves it (gemm), converted and read by compressed-tensors."""
    turned = weight.T.contiguous()
    numbers, zero, scale = _rounded(turned, 4, torch.arange(len(turned)) // size)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def pack(of: Tensor) -> Tensor:
        mixed = of.reshape(-1, 8)[:, order].reshape(of.shape)
        return _packed_rows(mixed.T.contiguous(), 4).T.contiguous()

    parts = {"qweight": pack(numbers), "qzeros": pack(zero), "scales": scale}
    converter = library("entrypoints.convert.converters").AutoAWQConverter(group_size=size, ignore=())
    converted = converter.process({f"layer.{name}": tensor for name, tensor in parts.items()})
    arguments = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": size}
    scheme = library("quantization").QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = library("compressors").BaseCompressor.get_value_from_registry("pack-quantized")
    state = {name.removeprefix("layer."): tensor for name, tensor in converted.items()}
    state["weight_scale"] = state["weight_scale"].float()
    return parts, compressor.decompress(state, scheme)["weight"]


def int8_rows(weight: Tensor) -> tuple[Parts, Tensor]:
    """int8 as bitsandbytes saves it (LLM.int8)."""
    largest = weight.abs().amax(1)
    numbers = torch.round(weight * 127 / largest[:, None]).to(torch.int8)
    parts = {"weight": numbers, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, numbers.float() * largest[:, None] / 127


Kind = Callable[[], tuple[dict[str, Any], Callable[[Tensor], tuple[Parts, Tensor]]]]
GROUP = {"num_bits": 4, "strategy": "group", "group_size": 16}

KINDS: dict[str, Kind] = {
    "fp8 by block": lambda: ({"quant_method": "fp8", "weight_block_size": [32, 16]}, fp8_blocks),
    "fp8 by tensor, ModelOpt": lambda: ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_tensor),
    "fp8 by channel": lambda: compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 by tensor": lambda: compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8 by block, compressed-tensors": lambda: compressed(
        "float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 16]}
    ),
    "mxfp8": lambda: compressed(
        "mxfp8-quantized",
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
    "nvfp4": lambda: compressed(
        "nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    ),
    "nvfp4, ModelOpt": lambda: ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, modelopt_nvfp4),
    "mxfp4, compressed-tensors": lambda: compressed(
        "mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    ),
    "int8 by channel": lambda: compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8 with zero points": lambda: compressed(
        "int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}
    ),
    "int4 packed": lambda: compressed("pack-quantized", GROUP),
    "int4 packed, zero points": lambda: compressed("pack-quantized", {**GROUP, "symmetric": False}),
    "int4 packed, by activation": lambda: compressed("pack-quantized", {**GROUP, "actorder": "group"}),
    "int3 packed": lambda: compressed("pack-quantized", {**GROUP, "num_bits": 3}),
    "int8 packed": lambda: compressed("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "awq": lambda: ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, awq),
    "gptq": lambda: ({"quant_method": "gptq", "bits": 4, "group_size": 16}, gptq(4)),
    "gptq, version 2": lambda: (
        {"quant_method": "gptq", "bits": 8, "group_size": 16, "checkpoint_format": "gptq_v2"},
        gptq(8, version=2),
    ),
    "gptq, by activation": lambda: (
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
        gptq(4, by_activation=True),
    ),
    "int8, bitsandbytes": lambda: ({"quant_method": "bitsandbytes", "load_in_8bit": True}, int8_rows),
}
"""A `quantization_config`, and the function that quantizes a weight: its tensors, and what a library reads in them."""


def quantized_checkpoint(folder: Path, kind: str, seed: int = 1, **model: Any) -> dict[str, Tensor]:
    """Save a tiny model with quantized projections; return all of its weights as a library reads them."""
    return quantize_folder(new_checkpoint(folder, seed, hidden=64, layers=2, **model), kind)


def quantize_folder(folder: Path, kind: str) -> dict[str, Tensor]:
    """Quantize the projections of a model in place; return all of its weights as a library reads them."""
    config, quantize = KINDS[kind]()
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, weight in weights_of(folder).items():
        if name.endswith("_proj.weight"):
            parts, expected[name] = quantize(weight.float())
            stem = name.removesuffix("weight")
            kept = {part: t for part, t in parts.items() if part not in ("k_scale", "v_scale") or part[0] + "_" in name}
            stored |= {f"{stem}{part}": tensor.contiguous().clone() for part, tensor in kept.items()}
        else:
            stored[name] = expected[name] = weight
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config=config)
    return expected


def change_config(folder: Path, file: str = "config.json", **changes: Any) -> None:
    """Write other values into a folder's config."""
    config = folder / file
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
