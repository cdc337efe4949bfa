"""The weights of the models that are merged: memory-mapped, one tensor at a time."""

import json
import pickle
import re
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
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

CAUSAL_MASKS = (".attn.bias", ".attention.bias")
"""Causal masks that old checkpoints of GPT-2 and GPT-NeoX carry, also as U8."""

PICKLE = ".bin"
"""The end of the names of files that torch.save writes."""

SHARD = re.compile(r"-(\d+)-of-(\d+)\.(?:safetensors|bin)$")
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


def widest(types: Iterable[torch.dtype]) -> torch.dtype:
    """Return the narrowest type that holds the numbers of all types without a loss; of one type that type itself."""
    return reduce(torch.promote_types, types)


def same(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are the same memory, as a base is that two models share."""
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape


class TensorCache:
    """Computed tensors that are in use, and the latest one: a merge reads a weight several times in a row.

    All readers of a time get the same tensor, so that `same` recognizes a base that two models share.
    """

    def __init__(self) -> None:
        self._held: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()
        self._latest: Tensor | None = None

    def get(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Return the tensor under a name, made now if it is not in memory."""
        tensor = self._held.get(name)
        if tensor is None:
            tensor = self._held[name] = make()
        self._latest = tensor
        return tensor


class Source:
    """A model's weights, by their names in the checkpoint."""

    shapes: Mapping[str, tuple[int, ...]]
    """Every tensor's shape, in the order of the checkpoint."""
    derived: Mapping[str, str]
    """{a tensor of the checkpoint that no merge needs: the reason}."""
    quantized: Collection[str] = ()
    """Weights whose stored numbers are rounded to a narrow type; see `noise`."""

    def tensor(self, name: str) -> Tensor:
        """Return one weight: a mapped view in its stored type; float32 where it is computed."""
        raise NotImplementedError

    def weight(self, name: str) -> Weight:
        """Return one weight, low-rank over another where it is."""
        return self.tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the type that a merge without a `dtype` writes the weight in: that of the weight as it is stored."""
        return stored(self.weight(name)).dtype

    def rounding_error(self, name: str) -> float:
        """Return the expected squared rounding error of a quantized weight, summed over its entries; 0 for others."""
        return 0.0


class Checkpoint(Source):
    """A folder of safetensors files, one or sharded. Opening reads headers only; tensors are mapped views.

    As in transformers, the file of the whole model (`model.safetensors`) comes first, then the files that an index
    names; without both all files are read. Without safetensors files, PyTorch's own files (`.bin`) are read, if they
    hold nothing but tensors: no code in them is run. Raises SourceError for files that are missing or incomplete, for a
    tensor that is in two files, and for quantized weights.
    """

    def __init__(self, folder: Path, pattern: str = "model*.safetensors", quantized: bool = False) -> None:
        """`pattern` are the files with the weights. With `quantized`, tensors of any type are read as they are."""
        self.folder = folder
        files, self._listed = _files_and_indices(folder, pattern)
        self.is_pickled = bool(files) and files[0].suffix == PICKLE
        """Whether the files are PyTorch's own and not safetensors files."""
        if not files:
            raise SourceError(_no_weights(folder))
        listed = {name: shard for shards in self._listed.values() for name, shard in shards.items()}
        found_in: dict[str, str] = {}
        self._handles: dict[str, Any] = {}
        self._views: dict[str, Tensor] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        derived: dict[str, str] = {}
        self.types: dict[str, str] = {}
        """Every tensor's type as it is stored, as safetensors names it."""
        for file in files:
            handle = _Pickle(file) if file.suffix == PICKLE else _open(file)
            try:
                held = [*handle.keys()]
                derived |= dict.fromkeys(
                    (name for name in held if name.endswith(DERIVED)), "the config determines them"
                )
                derived |= dict.fromkeys(
                    handle.copies if isinstance(handle, _Pickle) else (), "another name of a weight"
                )
                names = [
                    name for name in held if not name.endswith(DERIVED) and listed.get(name, file.name) == file.name
                ]
                if twice := next((name for name in names if name in found_in), None):
                    raise SourceError(
                        f"{folder}: {twice} is in {found_in[twice]} and in {file.name}; remove the file that does not"
                        " belong to the model (a leftover of an earlier save), or download the model again"
                    )
                found_in |= dict.fromkeys(names, file.name)
                headers = {name: handle.get_slice(name) for name in names}
                shapes |= {name: tuple(header.get_shape()) for name, header in headers.items()}
            except (SafetensorError, OSError) as error:
                raise _damaged(file, error) from error
            for name, header in headers.items():
                self.types[name] = str(header.get_dtype())
                if not quantized:
                    check_type(folder, name, shapes[name], self.types[name])
            self._handles |= dict.fromkeys(names, handle)
        self.shapes, self.derived = shapes, derived
        self._check_complete(files)

    def _check_complete(self, files: Sequence[Path]) -> None:
        """Raise SourceError for a missing shard, by the index or without one by the shards' numbers."""
        for index, shards in self._listed.items():
            for name, shard in shards.items():
                if name not in self.shapes and name not in self.derived and not name.endswith(DERIVED):
                    lacks = "which lacks it" if (self.folder / shard).exists() else "which is missing"
                    raise SourceError(
                        f"{self.folder}: {index.name} lists {name} in {shard}, {lacks}; download it again"
                    )
        numbered = [SHARD.search(file.name) for file in files] if not self._listed else []
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

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, (FLOATS | INTEGERS)[self.types[name]])


def weight_files(folder: Path, pattern: str = "model*.safetensors") -> list[Path]:
    """Return the files with a folder's weights: those of the pattern, other safetensors files, or `.bin` files.

    Raises SourceError for an index that cannot be read.
    """
    return _files_and_indices(folder, pattern)[0]


def _files_and_indices(folder: Path, pattern: str) -> tuple[list[Path], dict[Path, dict[str, str]]]:
    """Return the files with a folder's weights, and of each index that says what is in them every tensor's file.

    Files of an earlier save may lie beside them: neither these nor an old index beside the whole file are read.
    """
    pickled = "adapter_model*.bin" if pattern.startswith("adapter") else "pytorch_model*.bin"
    for each in (pattern, "*.safetensors", pickled):
        found, main = sorted(folder.glob(each)), folder / each.replace("*", "")
        if main in found:
            return [main], {}
        if found:
            index = main.with_name(f"{main.name}.index.json")
            indices = [index] if index.exists() else sorted(folder.glob(f"{each}.index.json"))
            listed = {of: _weight_map(of) for of in indices}
            if empty := next((of for of, shards in listed.items() if not shards), None):
                raise SourceError(f"{empty} names no weights; download it again")
            named = {shard for shards in listed.values() for shard in shards.values()}
            return [file for file in sorted(folder.iterdir()) if file.name in named] if listed else found, listed
    return [], {}


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")  # pyright: ignore[reportNoOverloadImplementation]
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> SourceError:
    what = _what_else(file) or f"is incomplete or not a safetensors file ({error})"
    return SourceError(f"{file} {what}; download it again")


class _Pickle:
    """A `.bin` file, read like a safetensors file: mapped, and by PyTorch's reader that makes tensors only."""

    def __init__(self, file: Path) -> None:
        try:
            held: Any = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            what = _what_else(file) or (
                f"holds more than tensors, which could be harmful code, or is damaged ({reason})"
                if isinstance(error, pickle.UnpicklingError)
                else f"is incomplete or not written by a current torch.save ({reason})"
            )
            raise SourceError(f"{file} {what}; download it again, or get the model as safetensors files") from error
        if not isinstance(held, dict) or not all(isinstance(each, Tensor) for each in held.values()):
            raise SourceError(f"{file} holds no weights by name; get the model as safetensors files")
        weights = cast(dict[str, Tensor], held)
        # A tied head is saved with the embeddings, as one memory under two names: safetensors files have the first.
        first: dict[tuple[int, tuple[int, ...]], str] = {}
        owners = {name: first.setdefault((w.data_ptr(), tuple(w.shape)), name) for name, w in weights.items()}
        self._weights = {name: w for name, w in weights.items() if owners[name] == name or not w.numel()}
        self.copies = [name for name in weights if name not in self._weights]

    def keys(self) -> Iterable[str]:
        return self._weights.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self._weights[name]

    def get_slice(self, name: str) -> "_Header":
        return _Header(self._weights[name])


@dataclass(frozen=True)
class _Header:
    weight: Tensor

    def get_shape(self) -> Sequence[int]:
        return self.weight.shape

    def get_dtype(self) -> str:
        stored_as = str(self.weight.dtype).removeprefix("torch.")
        return next((kind for kind, name in (FLOATS | INTEGERS).items() if name == stored_as), stored_as)


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


def _no_weights(folder: Path) -> str:
    """Return the message for a folder without safetensors files."""
    if indices := sorted(folder.glob("*.safetensors.index.json")):
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


def check_type(folder: Path, name: str, shape: Sequence[int], stored: str) -> None:
    """Raise SourceError for quantized and complex weights. Buffers of integers are copied."""
    if stored in FLOATS or name.endswith(CAUSAL_MASKS):
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
