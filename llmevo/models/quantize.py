"""Weights as they are served: rounded to a format of GGUF (`q8_0`, `q4_0`) or to FP8, and back.

The formats round weights; kernels of servers round activations as well, which is not part of this module.

- `q8_0`, `q4_0`: ggml's blocks of 32 numbers along the inputs, each with a float16 scale. The same bits as the
  quantizers of the `gguf` package (https://github.com/ggml-org/llama.cpp, `ggml-quants.c`).
- `f16`: float16, in which llama.cpp stores matrices whose rows do not divide into blocks.
- `fp8`: e4m3 with a scale for each output channel, max|row| / 448, in the weight's own type. The same bits as
  compressed-tensors' `float-quantized` with the strategy `channel` (the scheme FP8_DYNAMIC).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmevo.models.architecture import EMBEDDINGS, HEADS, text_config

FORMATS = ("q8_0", "q4_0", "fp8")
"""The formats of a whole model."""

BLOCK = 32
"""Numbers of a block in ggml's formats."""

FP8_MAX = 448.0
"""The largest number of e4m3."""

TOGETHER = 1 << 20
"""Numbers that are rounded at a time, so that memory stays flat."""

ROUTERS = re.compile(r"(^|\.)(gate|router|router\.layer|router\.classifier|shared_expert_gate)\.weight$")
"""Routers of mixtures of experts (the gate of an MLP is `gate_proj`): a few numbers that choose between experts."""
POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings|token_type_embeddings)\.weight$")
TOWERS = re.compile(
    r"(^|\.)((vis(ion|ual)|image|video|audio|speech|talker)\w*|embed_(vision|audio)|multi_modal_projector|mm_projector"
    r"|connector|aligner)\."
)
"""Encoders of images and sound: GGUF has a file of its own for them, and FP8 checkpoints leave them as they are."""
EXPERTS = re.compile(
    r"(^|\.)(experts|block_sparse_moe)\.(gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3|input_linear|output_linear)"
    r"(\.weight)?$"
)
"""All experts of a layer in one tensor: (experts, rows, columns)."""
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")


class Parts(NamedTuple):
    """A weight as a file stores it. The weight is codes · scales, for `q4_0` (codes - 8) · scales."""

    codes: Tensor
    """The weight's shape: int8 (`q8_0`), uint8 from 0 to 15 (`q4_0`), float8_e4m3fn (`fp8`), float16 (`f16`)."""
    scales: Tensor | None
    """float16 (…, columns / 32) in ggml's formats; (…, rows, 1) in the weight's type for `fp8`; None for `f16`."""


@dataclass(frozen=True)
class Quantizer:
    """The rounding of one model's weights: `rounded` for scores, `stored` and `parts` for files; see `quantizer`."""

    format: str
    """One of FORMATS."""
    tied: bool = False
    """Whether the embeddings are the output head as well."""
    transposed: bool = False
    """Whether the matrices of layers are (inputs, outputs), as in GPT-2."""
    transposed_experts: bool = False
    """Whether stacks of experts are (experts, inputs, outputs), as in Llama 4."""

    def stored(self, name: str, shape: Sequence[int]) -> str | None:
        """Return the format of a tensor by its name in the checkpoint: `q8_0`, `q4_0`, `f16` or `fp8`; None if it
        keeps its type.

        Matrices of linear layers and stacks of experts are quantized; norms, biases, convolutions, routers, position
        embeddings and the encoders of images and sound are not. Embeddings and output head: `fp8` keeps both. `q8_0`
        rounds both. `q4_0` rounds embeddings, and keeps the head, or embeddings that are the head as well, in `q8_0`,
        where llama.cpp's own files have q6_K, which the `gguf` package does not write.
        """
        if ROUTERS.search(name) or POSITIONS.search(name) or TOWERS.search(name):
            return None
        matrix = len(shape) == 2 and name.endswith(".weight") and "norm" not in name.rpartition(".")[0].split(".")[-1]
        if not matrix and not (len(shape) == 3 and EXPERTS.search(name)):
            return None
        head, embeddings = HEADS.search(name), EMBEDDINGS.search(name)
        if self.format == "fp8":
            return None if head or embeddings else "fp8"
        if shape[-2 if self.is_transposed(name, shape) else -1] % BLOCK:
            return "f16"
        return "q8_0" if head or (embeddings and self.tied) else self.format

    def is_transposed(self, name: str, shape: Sequence[int]) -> bool:
        """Return whether a tensor is (…, inputs, outputs), so that its blocks and channels are columns."""
        if len(shape) == 3:
            return self.transposed_experts and EXPERTS.search(name) is not None
        return self.transposed and CONV1D.search(name) is not None

    def parts(self, name: str, weight: Tensor) -> Parts | None:
        """Return a weight as it is stored, (outputs, inputs); None if it keeps its type. See `quantize`."""
        if (stored := self.stored(name, weight.shape)) is None:
            return None
        return quantize(weight.mT if self.is_transposed(name, weight.shape) else weight, stored)

    def rounded(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight as a server reads it, in its own type and shape; the same tensor if it keeps its type."""
        if (stored := self.stored(name, weight.shape)) is None:
            return weight
        if self.is_transposed(name, weight.shape):
            return rounded(weight.mT, stored).mT
        return rounded(weight, stored)


def quantizer(format: str, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any]) -> Quantizer:
    """Return the quantizer of a model by the shapes of its tensors and its config.json.

    Stacks of experts have the hidden state as inputs of `gate_up_proj` and outputs of `down_proj`; on which side it is
    in this architecture, its width shows.
    """
    text = text_config(config)
    hidden = text.get("hidden_size")
    stacks = [
        (found[3], shape) for name, shape in shapes.items() if len(shape) == 3 and (found := EXPERTS.search(name))
    ]
    sides = [
        shape[1:] if kind in ("down_proj", "w2", "output_linear") else (shape[2], shape[1]) for kind, shape in stacks
    ]
    return Quantizer(
        format,
        tied=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        or not any(HEADS.search(name) for name in shapes if name.endswith(".weight")),
        transposed=text.get("model_type") in ("gpt2", "openai-gpt"),
        transposed_experts=any(last == hidden != first for first, last in sides),
    )


def quantize(weight: Tensor, stored: str) -> Parts:
    """Round a weight (…, outputs, inputs) to `q8_0`, `q4_0`, `f16` or `fp8`.

    Needs several times the memory of the weight: pass pieces of rows where that matters.
    """
    return _QUANTIZE[stored](weight)


def dequantize(parts: Parts, stored: str, dtype: torch.dtype) -> Tensor:
    """Return the weight that parts stand for. ggml's formats compute in float32, `fp8` in the type of its scales."""
    codes, scales = parts
    if scales is None:
        return codes.to(dtype)
    if stored == "fp8":
        return (codes.to(scales.dtype) * scales).to(dtype)
    numbers = codes.unflatten(-1, (-1, BLOCK)).float()
    if stored == "q4_0":
        numbers -= 8
    return (numbers * scales.float().unsqueeze(-1)).flatten(-2).to(dtype)


def rounded(weight: Tensor, stored: str) -> Tensor:
    """Return a weight (…, outputs, inputs) after rounding to a format and back, in its type, a new tensor."""
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows, out in zip(_pieces(weight), _pieces(result), strict=True):
        out.copy_(dequantize(quantize(rows, stored), stored, weight.dtype))
    return result


def ggml_bytes(parts: Parts, stored: str) -> Tensor:
    """Return the bytes of a GGUF file for parts of `q8_0` or `q4_0`: uint8, (…, outputs, bytes of a row)."""
    assert parts.scales is not None
    codes = parts.codes.unflatten(-1, (-1, BLOCK))
    if stored == "q4_0":  # the first half of a block in the low bits, the second in the high bits
        codes = codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)
    scales = parts.scales.unsqueeze(-1).contiguous().view(torch.uint8)
    return torch.cat([scales, codes.contiguous().view(torch.uint8)], dim=-1).flatten(-2)


def _pieces(weight: Tensor) -> Sequence[Tensor]:
    rows = weight.flatten(0, -2) if weight.is_contiguous() else weight
    return rows.split(max(1, TOGETHER // max(1, rows[0].numel())))


def _q8_0(weight: Tensor) -> Parts:
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    codes = blocks * _inverse(scales)
    # Halves away from zero, as C's roundf; torch.round would take the even neighbour.
    size = codes.abs()
    codes = (size.floor() + (2 * (size - size.floor())).floor()).copysign(codes)
    return Parts(codes.to(torch.int8).flatten(-2), scales.squeeze(-1).half())


def _q4_0(weight: Tensor) -> Parts:
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    # The number of the largest size sets the scale with its sign, so it is always the code 0; of two such the first.
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scales = largest / -8
    codes = (blocks * _inverse(scales) + 8.5).trunc().clamp(0, 15)
    return Parts(codes.to(torch.uint8).flatten(-2), scales.squeeze(-1).half())


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0.0, 1 / scales)


def _fp8(weight: Tensor) -> Parts:
    scales = weight.abs().amax(-1, keepdim=True) / FP8_MAX
    scales = torch.where(scales == 0, torch.finfo(scales.dtype).eps, scales)
    # The zero point, 0, is added as compressed-tensors does: it turns -0 into 0.
    return Parts((weight / scales).add_(0.0).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales)


_QUANTIZE: Mapping[str, Callable[[Tensor], Parts]] = {
    "q8_0": _q8_0,
    "q4_0": _q4_0,
    "fp8": _fp8,
    "f16": lambda weight: Parts(weight.half(), None),
}
