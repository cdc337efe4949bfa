"""The weights of the models that are merged: memory-mapped, one tensor at a time."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmevo.errors import SourceError

DERIVED = ("rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry though the config determines them; never merged."""

FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""Types of weights that are merged, as safetensors and PyTorch name them."""

INTEGERS = {
    "BOOL": "bool",
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
"""Types of buffers and of quantized weights."""

BUFFERS = ("I64", "BOOL")
"""Types of buffers that are copied, such as position ids and masks. Quantized weights are I8, U8, I32 or F8_*."""

MASKS = (".attn.bias", ".attention.bias")
"""Causal masks that old checkpoints of GPT-2 and GPT-NeoX carry, also as U8."""

SHARD = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")
"""The end of a shard's name: its number, and the number of shards."""


@dataclass(frozen=True)
class LowRank:
    """A weight that is another one plus the product of two small factors, as a LoRA adapter makes it."""

    origin: Tensor
    """The weight under the adapter, as it is stored."""
    up: Tensor
    """(rows, rank), float32."""
    down: Tensor
    """(rank, columns), float32, with the adapter's scale in it."""

    def dense(self) -> Tensor:
        """Return the weight itself, float32."""
        return torch.addmm(self.origin.float(), self.up, self.down)


Weight = Tensor | LowRank
"""One model's weight: as it is stored, or low-rank over another one."""


def stored(weight: Weight) -> Tensor:
    """Return the weight's tensor, or the one under the adapter."""
    return weight.origin if isinstance(weight, LowRank) else weight


def same(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are the same memory, as a base is that two models share."""
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape


class Source:
    """A model's weights, by their names in the checkpoint."""

    shapes: Mapping[str, tuple[int, ...]]
    """Every tensor's shape, in the order of the checkpoint."""
    derived: Sequence[str]
    """Tensors of the checkpoint that are left out: its config determines them."""

    def tensor(self, name: str) -> Tensor:
        """Return one weight: a mapped view in its stored type; float32 where it is computed."""
        raise NotImplementedError

    def weight(self, name: str) -> Weight:
        """Return one weight, low-rank over another where it is."""
        return self.tensor(name)


class Checkpoint(Source):
    """A folder of safetensors files, one or sharded. Opening reads headers only; tensors are mapped views.

    Raises SourceError for files that are missing or incomplete, and for quantized weights.
    """

    def __init__(self, folder: Path, pattern: str = "model*.safetensors") -> None:
        self.folder = folder
        pattern = pattern if any(folder.glob(pattern)) else "*.safetensors"
        files = sorted(folder.glob(pattern))
        self._indices = sorted(folder.glob(f"{pattern}.index.json"))
        if not files:
            raise SourceError(_no_weights(folder, [*self._indices]))
        self._handles: dict[str, Any] = {}
        self._views: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        derived: list[str] = []
        for file in files:
            try:
                handle = safe_open(file, framework="pt")  # pyright: ignore[reportNoOverloadImplementation]
                held = [*handle.keys()]
                derived += [name for name in held if name.endswith(DERIVED)]
                names = [name for name in held if not name.endswith(DERIVED)]
                headers = {name: handle.get_slice(name) for name in names}
                shapes |= {name: tuple(header.get_shape()) for name, header in headers.items()}
            except (SafetensorError, OSError) as error:
                what = _what_else(file) or f"is incomplete or not a safetensors file ({error})"
                raise SourceError(f"{file} {what}; download it again") from error
            for name, header in headers.items():
                _check_type(folder, name, shapes[name], str(header.get_dtype()))
            self._handles |= dict.fromkeys(names, handle)
        self.shapes, self.derived = shapes, derived
        self._check_complete(files)

    def _check_complete(self, files: Sequence[Path]) -> None:
        """Raise SourceError for a missing shard, by the index or without one by the shards' numbers."""
        for index in self._indices:
            for name, shard in _weight_map(index).items():
                if name not in self.shapes and not name.endswith(DERIVED):
                    lacks = "which lacks it" if (self.folder / shard).exists() else "which is missing"
                    raise SourceError(
                        f"{self.folder}: {index.name} lists {name} in {shard}, {lacks}; download it again"
                    )
        numbered = [SHARD.search(file.name) for file in files] if not self._indices else []
        if numbered and all(numbered):
            shards = {int(found[1]): found[2] for found in numbered if found}
            of = max(shards.values(), key=int)
            if lost := {*range(1, int(of) + 1)} - {*shards}:
                raise SourceError(f"{self.folder}: shard {min(lost)} of {int(of)} is missing; download it")

    def tensor(self, name: str) -> Tensor:
        # The view is kept: it holds no memory of its own, and making it costs more than merging a small tensor.
        if name not in self._views:
            self._views[name] = self._handles[name].get_tensor(name)
        return self._views[name]


def read_object(file: Path, hint: str = "download it again") -> dict[str, Any]:
    """Return the object in a JSON file. Raises SourceError that says what else the file is, and ends with the hint."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{file} is missing; {hint}") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} {_what_else(file) or f'is not valid JSON ({error})'}; {hint}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{file} holds a JSON {type(content).__name__}, not an object ({{…}}); {hint}")
    return cast(dict[str, Any], content)


def _what_else(file: Path) -> str:
    """Return what a file is instead of what its name says, where its first bytes show it."""
    try:
        with file.open("rb") as content:
            head = content.read(256).lstrip().lower()
    except OSError as error:
        return f"cannot be read ({error})"
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself (`git lfs pull` in its repository gets that)"
    if head.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not the file itself"
    return ""


def _weight_map(index: Path) -> dict[str, str]:
    """Return the shard of every tensor, from the index of a sharded checkpoint."""
    listed: Any = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        kind = type(listed).__name__
        raise SourceError(f"{index} is no index of a checkpoint (weight_map is {kind}); download it again")
    return cast(dict[str, str], listed)


def _no_weights(folder: Path, indices: Sequence[Path]) -> str:
    """Return the message for a folder without safetensors files."""
    if indices:
        shards = sorted({*_weight_map(indices[0]).values()})
        return f"{folder}: {indices[0].name} lists {len(shards)} shards, and all are missing; download {shards[0]} …"
    other = next((file.name for file in sorted(folder.glob("*.bin"))), None)
    if other and "adapter" in other:
        return f"{folder}: there is no .safetensors file, only {other}; save the adapter again with a current PEFT"
    found = f", only {other}" if other else ""
    return (
        f"{folder}: there is no .safetensors file{found}; save the model with transformers'"
        " AutoModelForCausalLM.from_pretrained(…).save_pretrained(…), or check that its download is complete"
    )


def _check_type(folder: Path, name: str, shape: Sequence[int], stored: str) -> None:
    """Raise SourceError for quantized and complex weights. Buffers of integers are copied."""
    if stored in FLOATS or name.endswith(MASKS):
        return
    if stored in INTEGERS and not name.endswith((".weight", ".bias")) and (stored in BUFFERS or len(shape) < 2):
        return
    if stored.startswith("C"):
        raise SourceError(f"{folder}: {name} holds complex numbers ({stored}); llmevo merges real ones")
    raise SourceError(
        f"{folder}: {name} is stored as {INTEGERS.get(stored, stored)}; quantized weights cannot be merged: their"
        " numbers mean nothing without their scales: dequantize the model first, or name the model that it was"
        " quantized from (in bfloat16, float16 or float32)"
    )
