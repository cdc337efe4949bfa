"""Quantized checkpoints as sources: every weight is dequantized when it is read, one at a time, and never rounded.

| `quant_method` of config.json | tensors of a weight W |
|---|---|
| `fp8` (DeepSeek, Qwen, transformers) | `W` (e4m3) · `W_scale_inv`, one for each block of `weight_block_size` |
| `fbgemm_fp8`, `modelopt`, `compressed-tensors` | `W` (e4m3, int8) · `W_scale`, of the tensor, a row, group or block |
| `modelopt` (NVFP4) | `W` (two e2m1 in a byte) · `W_scale` (e4m3, of 16 weights) · `W_scale_2` |
| `compressed-tensors` | `W_packed` (e2m1) · `W_scale` / `W_global_scale` |
| `compressed-tensors` | (`W_packed` (integers in int32) - `W_zero_point`) · `W_scale` |
| `mxfp4` (gpt-oss) | `W_blocks` (e2m1) · 2^(`W_scales` - 127), of 32 weights; columns and rows are exchanged |
| `awq`, `gptq` | (`qweight` - `qzeros`) · `scales`, of a group of input channels |
| `bitsandbytes` | `W` (int8) · `SCB` / 127, or `W` (nf4, fp4) · `W.absmax`, of 64 weights |
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from llmevo.errors import SourceError
from llmevo.models.checkpoints import CAUSAL_MASKS, Checkpoint, Source, TensorCache, check_type, read_object

CONFIG_KEYS = ("quantization_config", "compression_config")
"""Keys of config.json for a quantization."""

METHODS = (
    *("fp8", "fbgemm_fp8", "modelopt", "modelopt_fp4", "compressed-tensors", "mxfp4", "awq", "gptq", "bitsandbytes"),
)
"""Values of `quant_method` that are read."""

FORMATS = (
    *("dense", "naive-quantized", "float-quantized", "int-quantized", "pack-quantized", "mixed-precision"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"),
)
"""Values of `format` of compressed-tensors that are read."""

ACTIVATIONS = (
    *("input_scale", "input_global_scale", "input_zero_point", "activation_scale", "input_activation_scale"),
    *("output_scale", "output_zero_point", "q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point"),
    *("prob_scale", "kv_scale"),
)
"""Last parts of the names of tensors that are left out: scales of activations and of the key-value cache, which a
model without quantization does not have."""

QUANTIZED_ENDS = (
    *("_scale", "_scale_inv", "_scale_2", "_global_scale", "_zero_point", "_g_idx", "_shape", "_scales", "_blocks"),
    *("_packed", ".qweight", ".qzeros", ".scales", ".g_idx", ".SCB", ".absmax", ".quant_map", ".nested_absmax"),
    *(".nested_quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", "_format"),
    "pre_quant_scale",
)
"""Ends of the names of tensors that are parts of quantized weights."""

FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}

CODES = (*FLOAT8, "I8", "U8")
"""Types of quantized weights under their own names."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The 16 numbers of FP4 (Open Compute Project, Microscaling Formats 1.0, table 5)."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The places in an int32 of eight consecutive weights of AWQ (AutoAWQ, `gemm`)."""

ROWS = 128
"""Rows that are scaled at a time where blocks do not divide a weight."""

NAMED_BY = "name the model that it was quantized from (in bfloat16, float16 or float32), or save it dequantized"


@dataclass(frozen=True)
class Quantized:
    """One quantized weight: numbers of a narrow type, and scales that blocks of them share."""

    shape: tuple[int, ...]
    """Of the weight itself."""
    parts: Sequence[str]
    """Its tensors in the checkpoint."""
    values: Callable[[], Tensor]
    """The stored numbers, without their zero points: new memory, float32, (…, rows, columns)."""
    scale: Callable[[], Tensor]
    """The scales, float32: one, or one for each block, (…, rows of blocks, columns of blocks)."""
    block: tuple[int, int]
    """Rows and columns of the weights that share a scale."""
    levels: Sequence[float] = ()
    """The numbers of the narrow type, ascending; empty for whole numbers."""
    exchanged: bool = False
    """Whether rows and columns of the stored numbers are the weight's columns and rows."""
    dtype: torch.dtype = torch.float32
    """A type that holds every weight without rounding, where float32 is wider than needed."""

    def dequantized(self) -> Tensor:
        """Return the weight, stored number · scale, in float32 (or `dtype`)."""
        return self._placed(scaled(self.values(), self.scale(), self.block)).to(self.dtype)

    def rounding_error(self) -> float:
        """Return the expected squared rounding error of the whole weight, Σ E[(w - w')²].

        An unquantized weight is taken to lie anywhere between the two middles of a stored number and its neighbours
        with equal probability: step²/12 for equal steps.
        """
        values = self.values()
        deviations = _deviations(values, self.levels) if self.levels else values.fill_(1 / math.sqrt(12))
        return float(scaled(deviations, self.scale(), self.block).double().square().sum())

    def _placed(self, tensor: Tensor) -> Tensor:
        return (tensor.transpose(-2, -1).contiguous() if self.exchanged else tensor).reshape(self.shape)


def scaled(values: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiply a tensor (…, rows, columns) in place, each block of rows and columns by its scale."""
    return _by_blocks(values, scale, block, Tensor.mul_)


def _by_blocks(values: Tensor, grid: Tensor, block: tuple[int, int], apply: Callable[[Tensor, Tensor], Any]) -> Tensor:
    """Apply an operation in place to each block of a tensor and its entry of the grid."""
    if grid.numel() == 1:
        apply(values, grid.reshape(()))
        return values
    rows, columns = values.shape[-2:]
    high, wide = block
    grid = grid.reshape(-1, -(-rows // high), -(-columns // wide))
    if rows % high == 0 and columns % wide == 0:
        apply(values.view(-1, rows // high, high, columns // wide, wide), grid[:, :, None, :, None])
        return values
    several = -(-ROWS // high)
    for matrix, of in zip(values.view(-1, rows, columns), grid, strict=True):
        for first in range(0, of.shape[0], several):
            part = matrix[first * high : (first + several) * high]
            wanted = of[first : first + several].repeat_interleave(high, 0)[: part.shape[0]]
            apply(part, wanted.repeat_interleave(wide, 1)[:, :columns])
    return values


def _deviations(values: Tensor, levels: Sequence[float]) -> Tensor:
    """Return the standard deviation of what was rounded to each number."""
    each = torch.tensor(levels)
    half = each.diff() / 2
    below, above = torch.cat([half[:1], half]), torch.cat([half, half[-1:]])
    deviation = ((below**3 + above**3) / (3 * (below + above))).sqrt()
    return deviation[torch.searchsorted(each, values).clamp_(max=len(levels) - 1)]


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """Return the quantization that a model's config.json, or ModelOpt's hf_quant_config.json, names; None without.

    Raises SourceError for a config that cannot be read, and for a quantization that is not read.
    """
    config = read_object(folder / "config.json") if (folder / "config.json").exists() else {}
    file, found = folder / "config.json", next((config[key] for key in CONFIG_KEYS if config.get(key)), None)
    if found is None and (folder / "hf_quant_config.json").exists():
        file = folder / "hf_quant_config.json"
        found = {"quant_method": "modelopt", **(read_object(file).get("quantization") or {})}
    if found is None:
        return None
    if not isinstance(found, dict):
        raise SourceError(f"{file}: quantization_config is {found!r}; it must be an object, as it was saved")
    given = cast(dict[str, Any], found)
    _check_method(file, given)
    return given


def _check_method(file: Path, given: Mapping[str, Any]) -> None:
    """Raise SourceError for a quantization that is not read, with the key and its value."""
    method = _method(given)
    wrong = ""
    if method not in METHODS:
        wrong = f"quant_method is {given.get('quant_method')!r}; llmevo reads {', '.join(METHODS)}"
    elif method == "compressed-tensors":
        sparse, turned = given.get("sparsity_config") or {}, given.get("transform_config") or {}
        formats = [given.get("format"), *(group.get("format") for group in _groups(given))]
        if strange := next((each for each in formats if each and each not in FORMATS), None):
            wrong = f"format is {strange!r}; llmevo reads {', '.join(FORMATS)}"
        elif sparse.get("format", "dense") != "dense":
            wrong = f"sparsity_config.format is {sparse['format']!r}; llmevo reads dense weights"
        elif turned.get("config_groups"):
            wrong = "transform_config: its weights are rotated; llmevo merges weights as a model without rotation has"
    elif method == "awq" and (str(given.get("version", "gemm")).lower(), given.get("bits", 4)) != ("gemm", 4):
        wrong = f"version is {given.get('version')!r} with bits: {given.get('bits')}; llmevo reads gemm with 4"
    elif method == "gptq" and given.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        wrong = f"checkpoint_format is {given['checkpoint_format']!r}; llmevo reads gptq and gptq_v2"
    if wrong:
        raise SourceError(f"{file}: quantization_config: {wrong}: {NAMED_BY}")


def _method(given: Mapping[str, Any]) -> str:
    return str(given.get("quant_method", "")).lower().replace("compressed_tensors", "compressed-tensors")


def _groups(given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = given.get("config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


class QuantizedCheckpoint(Source):
    """A folder whose config.json names a quantization; `shapes` are those of the dequantized weights.

    A dequantized weight is new memory; it is the same tensor for all who read it at a time. Raises SourceError for a
    quantization that is not read, and for a weight whose scales are missing or do not fit.
    """

    def __init__(self, folder: Path, quantization: Mapping[str, Any]) -> None:
        """`quantization` is what `quantization_of` returns."""
        self.folder, self.quantization = folder, quantization
        self._raw = Checkpoint(folder, quantized=True)
        self._readers = _Readers(self._raw, quantization)
        self._weights: dict[str, Quantized] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        used: set[str] = set()
        for name, weight in self._readers.weights():
            shapes[name] = self._raw.shapes[name] if weight is None else weight.shape
            if weight:
                self._weights[name] = weight
                used |= {*weight.parts}
        self.activations = [name for name in self._raw.shapes if _is_of_activations(name)]
        """Scales of activations and of the key-value cache, which are left out."""
        rest = [
            name
            for name in self._raw.shapes
            if name.endswith(QUANTIZED_ENDS) and name not in used and name not in shapes
        ]
        if lost := next((name for name in rest if name not in self.activations), None):
            raise SourceError(
                f"{folder}: {lost} belongs to no quantized weight that llmevo can read (quant_method:"
                f" {_method(quantization)}); download the model again, or {NAMED_BY}"
            )
        self.shapes = shapes
        self.derived = {**self._raw.derived, **dict.fromkeys(self.activations, "scales of activations, not of weights")}
        self.quantized = self._weights.keys()
        self._kept = TensorCache()
        config = read_object(folder / "config.json") if (folder / "config.json").exists() else {}
        named = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
        self._dtype: torch.dtype = getattr(torch, named) if named in ("float16", "float32") else torch.bfloat16

    def tensor(self, name: str) -> Tensor:
        weight = self._weights.get(name)
        return self._kept.get(name, weight.dequantized) if weight else self._raw.tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type that config.json names, for a quantized weight."""
        return self._dtype if name in self._weights else self._raw.dtype(name)

    def rounding_error(self, name: str) -> float:
        return self._weights[name].rounding_error() if name in self._weights else 0.0


def _is_of_activations(name: str) -> bool:
    return name.rpartition(".")[2] in ACTIVATIONS


@dataclass
class _Readers:
    """The weights of a raw checkpoint, by the names and types of its tensors."""

    raw: Checkpoint
    given: Mapping[str, Any]

    def weights(self) -> Iterator[tuple[str, Quantized | None]]:
        """Yield every weight's name, and how it is quantized; None where it is not."""
        for name, kind in self.raw.types.items():
            if name.endswith("_packed"):
                yield name.removesuffix("_packed"), self._packed(name)
            elif name.endswith(".qweight"):
                yield name.removesuffix("qweight") + "weight", self._grouped(name)
            elif name.endswith("_blocks"):
                yield name.removesuffix("_blocks"), self._mxfp4(name)
            elif _is_of_activations(name) or (name.endswith(QUANTIZED_ENDS) and self._is_part(name)):
                continue
            elif kind in CODES and len(self.raw.shapes[name]) > 1 and not name.endswith(CAUSAL_MASKS):
                yield name, self._named(name, kind)
            else:
                check_type(self.raw.folder, name, self.raw.shapes[name], kind)
                yield name, None

    def _is_part(self, name: str) -> bool:
        """Return whether a tensor belongs to a quantized weight: a router may be called so as well."""
        whole = self.raw.types.keys()
        stems = [name.removesuffix(end) for end in QUANTIZED_ENDS if name.endswith(end)]
        beside = ("", "_packed", "_blocks", ".qweight", ".weight")
        return any(f"{stem}{end}" in whole for stem in stems for end in beside) or name.endswith("pre_quant_scale")

    def _error(self, name: str, what: str) -> SourceError:
        return SourceError(f"{self.raw.folder}: {name} {what}; download the model again, or {NAMED_BY}")

    def _need(self, name: str, of: str) -> str:
        if name not in self.raw.shapes:
            raise self._error(of, f"is quantized, but its {name.rpartition('.')[2]} ({name}) is missing")
        return name

    def _named(self, name: str, kind: str) -> Quantized:
        """A weight under its own name: FP8 or int8 with scales, NVFP4 of ModelOpt, or bitsandbytes'."""
        raw, shapes = self.raw, self.raw.shapes
        if f"{name}.absmax" in shapes:
            return self._bitsandbytes(name)
        row = name.removesuffix("weight") + "SCB"
        if row in shapes and kind == "I8":
            block, form = self._grid(name, shapes[name], row), name.removesuffix("weight") + "weight_format"
            return Quantized(
                shapes[name],
                (name, row, form),
                lambda: raw.tensor(name).float(),
                lambda: raw.tensor(row).float()[:, None] / 127,
                block,
            )
        ends = ("_scale_inv", "_scale", "_scale_2")
        scale = next((f"{name}{end}" for end in ends if f"{name}{end}" in shapes), "")
        if not scale:
            raise self._error(name, f"is stored as {kind}, but {name}_scale or {name}_scale_inv is missing")
        if kind == "U8":
            whole = self._need(f"{name}_scale_2", name)
            return self._fp4(name, f"{name}_scale", whole)
        parts, zero = [name, scale], f"{name}_zero_point"
        block = self._grid(name, shapes[name], scale)

        def values() -> Tensor:
            numbers = raw.tensor(name).float()
            if zero in shapes:
                _by_blocks(numbers, raw.tensor(zero).float(), block, Tensor.sub_)
            return numbers

        if zero in shapes:
            self._same_shape(zero, shapes[zero], shapes[scale])
            parts.append(zero)
        levels = _levels_of(FLOAT8[kind]) if kind in FLOAT8 else ()
        return Quantized(shapes[name], parts, values, lambda: _as_scale(raw.tensor(scale)), block, levels)

    def _packed(self, name: str) -> Quantized:
        """compressed-tensors' packed weights: FP4 in bytes, or whole numbers in int32."""
        raw, stem = self.raw, name.removesuffix("_packed")
        scale = self._need(f"{stem}_scale", name)
        if raw.types[name] == "U8":
            if raw.types[scale] == "U8":  # MXFP4
                return self._fp4(name, scale)
            whole = self._need(f"{stem}_global_scale", name)
            return self._fp4(name, scale, whole, divides=True)
        return self._int32(name, stem, scale)

    def _fp4(self, name: str, scale: str, whole: str = "", divides: bool = False) -> Quantized:
        """Two FP4 numbers in a byte, scales of groups, and a number that multiplies or divides all of the scales."""
        raw = self.raw
        *before, rows, half = raw.shapes[name]
        shape = (*before, rows, 2 * half)
        if whole and math.prod(raw.shapes[whole]) != 1:
            raise self._error(whole, f"has the shape {raw.shapes[whole]}; it must be one number")

        def scales() -> Tensor:
            of = _as_scale(raw.tensor(scale))
            if not whole:
                return of
            number = raw.tensor(whole).float().reshape(())
            return of / number if divides else of * number

        return Quantized(
            shape,
            (name, scale, *([whole] if whole else [])),
            lambda: _unpack_fp4(raw.tensor(name)),
            scales,
            self._grid(name, shape, scale),
            _LEVELS,
            dtype=torch.float32 if whole else torch.bfloat16,
        )

    def _mxfp4(self, name: str) -> Quantized:
        """gpt-oss: (experts, rows, groups, 16) bytes; transformers holds the weight as (experts, columns, rows)."""
        raw, stem = self.raw, name.removesuffix("_blocks")
        scale = self._need(f"{stem}_scales", name)
        blocks = raw.shapes[name]
        if len(blocks) != 4 or raw.types[name] != "U8":
            raise self._error(
                name, f"has the shape {blocks} and the type {raw.types[name]}, which is not that of MXFP4"
            )
        self._same_shape(scale, raw.shapes[scale], blocks[:-1])
        experts, rows, groups, half = blocks

        def values() -> Tensor:
            return _unpack_fp4(raw.tensor(name)).reshape(experts, rows, groups * half * 2)

        shape = (experts, groups * half * 2, rows)
        return Quantized(
            shape,
            (name, scale),
            values,
            lambda: _as_scale(raw.tensor(scale)),
            (1, 2 * half),
            _LEVELS,
            exchanged=True,
            dtype=torch.bfloat16,
        )

    def _int32(self, name: str, stem: str, scale: str) -> Quantized:
        """compressed-tensors' `pack-quantized`: consecutive weights of a row in an int32, the first in the low bits."""
        raw, sizes = self.raw, self._need(f"{stem}_shape", name)
        shape = tuple(int(size) for size in raw.tensor(sizes))
        bits = self._bits(name, raw.shapes[name][-1], shape[-1])
        if raw.shapes[name][:-1] != shape[:-1]:
            raise self._error(name, f"has the shape {raw.shapes[name]}, which does not fit {sizes} {shape}")
        zero, places = f"{stem}_zero_point", f"{stem}_g_idx"
        block = self._grid(name, shape, scale)
        parts = [name, scale, sizes, *(each for each in (zero, places) if each in raw.shapes)]
        by_column = places in raw.shapes and self._is_permuted(places, block[1])

        def spread(grid: Tensor) -> Tensor:
            return grid[..., raw.tensor(places).long()] if by_column else grid

        def zeros() -> Tensor:
            stored = raw.tensor(zero)
            if raw.types[zero] != "I32":
                return stored.float()
            rows, groups = raw.shapes[scale][-2:]
            unpacked = _unpack_int32(stored.transpose(-2, -1), bits, rows).transpose(-2, -1)
            return (unpacked - 2 ** (bits - 1)).reshape(*raw.shapes[scale][:-2], rows, groups)

        within = (1, 1) if by_column else block

        def values() -> Tensor:
            numbers = _unpack_int32(raw.tensor(name), bits, shape[-1]).sub_(2 ** (bits - 1))
            return _by_blocks(numbers, spread(zeros()), within, Tensor.sub_) if zero in raw.shapes else numbers

        return Quantized(shape, parts, values, lambda: spread(_as_scale(raw.tensor(scale))), within)

    def _is_permuted(self, places: str, size: int) -> bool:
        """Return whether the groups of a weight's input channels are others than consecutive ones of a size."""
        groups = self.raw.tensor(places).long()
        return bool((groups >= 0).all()) and not torch.equal(groups, torch.arange(len(groups)) // size)

    def _bits(self, name: str, packed: int, columns: int) -> int:
        weights = [group.get("weights") or {} for group in _groups(self.given)]
        known = sorted({int(each["num_bits"]) for each in weights if each.get("num_bits")})
        fits = [bits for bits in known if 1 <= bits <= 8 and -(-columns // (32 // bits)) == packed]
        if len(fits) != 1:
            raise self._error(
                name, f"has {packed} int32 for {columns} weights of a row, which does not fit num_bits: {known}"
            )
        return fits[0]

    def _grouped(self, name: str) -> Quantized:
        """AWQ and GPTQ: (input channels, output channels), with scales of a group of input channels."""
        raw, stem = self.raw, name.removesuffix("qweight")
        scale = self._need(f"{stem}scales", name)
        zero, places = f"{stem}qzeros", f"{stem}g_idx"
        groups, columns = raw.shapes[scale]
        parts = [name, scale, *(each for each in (zero, places) if each in raw.shapes)]
        is_awq = _method(self.given) == "awq"
        if is_awq:
            bits, rows = 4, raw.shapes[name][0]
            wanted = (rows, columns // 8)
        else:
            rows = raw.shapes[places][0] if places in raw.shapes else raw.shapes[name][0] * 32 // self._gptq_bits(name)
            bits = 32 * raw.shapes[name][0] // rows if rows else 0
            wanted = (rows * bits // 32, columns)
            if bits not in (2, 4, 8):
                raise self._error(name, f"packs weights of {bits} bits; llmevo reads GPTQ of 2, 4 and 8 bits")
        size = rows // groups if groups and rows % groups == 0 else int(self.given.get("group_size") or 0)
        if raw.shapes[name] != wanted or size < 1 or -(-rows // size) != groups:
            raise self._error(name, f"has the shape {raw.shapes[name]}, which does not fit {scale} {raw.shapes[scale]}")
        if zero in raw.shapes:
            self._same_shape(zero, raw.shapes[zero], (groups, columns * bits // 32))
        more = 0 if is_awq or self.given.get("checkpoint_format") == "gptq_v2" else 1
        by_row = places in raw.shapes and not is_awq and self._is_permuted(places, size)

        def unpack(tensor: Tensor) -> Tensor:
            numbers = _unpack_int32(tensor, bits, columns)
            if not is_awq:
                return numbers
            return numbers.view(-1, columns // 8, 8)[..., list(AWQ_ORDER)].reshape(-1, columns)

        def spread(grid: Tensor) -> Tensor:
            return grid[raw.tensor(places).long()] if by_row else grid

        def zeros() -> Tensor:
            if zero not in raw.shapes:
                return torch.tensor(float(2 ** (bits - 1)))
            # The first version of GPTQ stores each zero point less 1, in `bits` bits.
            return spread(unpack(raw.tensor(zero)).add_(more).remainder_(2**bits))

        within = (1, 1) if by_row else (size, 1)

        def values() -> Tensor:
            stored = raw.tensor(name)
            numbers = unpack(stored) if is_awq else _unpack_int32(stored.T, bits, rows).T.contiguous()
            return _by_blocks(numbers, zeros(), within, Tensor.sub_)

        return Quantized(
            (columns, rows), parts, values, lambda: spread(raw.tensor(scale).float()), within, exchanged=True
        )

    def _gptq_bits(self, name: str) -> int:
        bits = self.given.get("bits")
        if not isinstance(bits, int) or bits < 1:
            raise self._error(name, f"is packed, and quantization_config.bits is {bits!r}")
        return bits

    def _bitsandbytes(self, name: str) -> Quantized:
        """bitsandbytes' 4-bit types: (n / 2, 1) bytes, the first weight in the high bits, and what they stand for."""
        raw = self.raw
        about = next(
            (n for kind in ("nf4", "fp4") if (n := f"{name}.quant_state.bitsandbytes__{kind}") in raw.shapes), ""
        )
        table = self._need(f"{name}.quant_map", name)
        scale, nested = f"{name}.absmax", f"{name}.nested_absmax"
        if not about:
            raise self._error(
                name, f"is quantized by bitsandbytes, but {name}.quant_state.bitsandbytes__nf4 is missing"
            )
        try:
            state: dict[str, Any] = json.loads(bytes(raw.tensor(about).tolist()))
            shape, size = tuple(map(int, state["shape"])), int(state["blocksize"])
            entries = math.prod(shape)
            fits = math.prod(raw.shapes[name]) == -(-entries // 2)
        except (ValueError, KeyError, TypeError) as error:
            raise self._error(about, f"cannot be read ({type(error).__name__}: {error})") from error
        if not fits or math.prod(raw.shapes[scale]) != -(-entries // size):
            raise self._error(name, f"has the shape {raw.shapes[name]}, which does not fit {shape} and its absmax")
        parts = [name, about, table, scale]
        if nested in raw.shapes:
            parts += [nested, self._need(f"{name}.nested_quant_map", name)]

        def values() -> Tensor:
            return _look_up(raw.tensor(table).float(), raw.tensor(name).flatten(), True)[:entries].view(1, -1)

        def scales() -> Tensor:
            stored = raw.tensor(scale)
            if nested not in raw.shapes:
                return stored.float()
            # The scales are quantized themselves, to 8 bits in blocks, around an offset.
            coarse = raw.tensor(f"{name}.nested_quant_map").float()[stored.long()]
            of = raw.tensor(nested).float().repeat_interleave(int(state["nested_blocksize"]))[: coarse.numel()]
            return coarse * of + float(state["nested_offset"])

        levels = sorted({*raw.tensor(table).float().tolist()})
        return Quantized(shape, parts, values, scales, (1, size), levels)

    def _same_shape(self, name: str, shape: Sequence[int], wanted: Sequence[int]) -> None:
        if tuple(shape) != tuple(wanted):
            raise self._error(name, f"has the shape {tuple(shape)}; it must be {tuple(wanted)} to fit its weight")

    def _grid(self, name: str, shape: tuple[int, ...], scale: str) -> tuple[int, int]:
        """Return the rows and columns that share a scale. Raises SourceError for scales that do not fit the weight."""
        of, (*before, rows, columns) = self.raw.shapes[scale], shape
        if math.prod(of) == 1:
            return rows, columns
        if of == (*before, rows):
            return 1, columns
        if of in (tuple(before), (*before, 1)) and before:
            return rows, columns
        if len(of) == len(shape) and [*of[:-2]] == before:
            high, wide = of[-2:]
            if (block := self._block) and (-(-rows // block[0]), -(-columns // block[1])) == (high, wide):
                return block
            if high in (1, rows) and wide and columns % wide == 0:
                return rows // high, columns // wide
        said = f", and blocks are {[*self._block]}" if self._block else ""
        raise self._error(scale, f"has the shape {of}, which does not fit the weight {name} {shape}{said}")

    @cached_property
    def _block(self) -> tuple[int, int] | None:
        """The block that the config names."""
        weights = [group.get("weights") or {} for group in _groups(self.given)]
        named = [self.given.get("weight_block_size"), *(each.get("block_structure") for each in weights)]
        for size in named:
            if isinstance(size, str) and size.count("x") == 1:
                size = [int(each) for each in size.split("x") if each.isdigit()]
            if isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size):
                return size[0], size[1]
            if size is not None:
                raise SourceError(
                    f"{self.raw.folder}: quantization_config: the size of blocks is {size!r}; it must be two whole"
                    " numbers, as [128, 128]"
                )
        return None


def _as_scale(stored: Tensor) -> Tensor:
    """Return scales as float32; bytes are exponents of 2 (E8M0)."""
    if stored.dtype == torch.uint8:
        return torch.ldexp(torch.ones(stored.shape), stored.int() - 127)
    return stored.float()


def _nibbles(stored: Tensor, high_first: bool = False) -> Tensor:
    """Return the two 4-bit numbers of each byte, in a last dimension of twice the length."""
    low, high = (stored & 0xF).int(), (stored >> 4).int()
    pair = (high, low) if high_first else (low, high)
    return torch.stack(pair, dim=-1).reshape(*stored.shape[:-1], -1)


def _look_up(table: Tensor, stored: Tensor, high_first: bool = False) -> Tensor:
    """Return the two numbers of each byte by a table of 16, in a last dimension of twice the length.

    Both are looked up together, by an index of 4 bytes: experts are stored in tensors of billions of numbers.
    """
    pairs = table[_nibbles(torch.arange(256, dtype=torch.uint8), high_first).view(256, 2)]
    return pairs.index_select(0, stored.flatten().int()).view(*stored.shape[:-1], -1)


def _unpack_fp4(stored: Tensor) -> Tensor:
    """Return the two FP4 numbers of each byte, the first in the low bits."""
    return _look_up(torch.tensor(E2M1), stored)


def _unpack_int32(stored: Tensor, bits: int, columns: int) -> Tensor:
    """Return the first `columns` numbers of each row, packed into int32 from the low bits on, as float32."""
    several = 32 // bits
    numbers = torch.empty(*stored.shape, several)
    for place in range(several):
        numbers[..., place] = (stored >> (place * bits)) & (2**bits - 1)
    return numbers.flatten(-2)[..., :columns].contiguous()


_LEVELS = tuple(sorted({*E2M1}))


def _levels_of(dtype: torch.dtype) -> Sequence[float]:
    """Return all finite numbers of an 8-bit floating-point type, ascending."""
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return sorted({*every[every.isfinite()].tolist()})
