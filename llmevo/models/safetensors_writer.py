"""Weights into safetensors files, one weight at a time: no more than a few are ever in memory."""

import ctypes
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARD_BYTES = 5 * 10**9
"""The size of a weight file at most, but for a weight that is larger alone; as in mergekit."""

KEPT_BYTES = 50 * 10**6
"""Written weights, after which their memory is given back."""

SAFETENSORS_TYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class _Shard:
    """One safetensors file, written weight by weight.

    Its header comes first and is known last, so room is left for it, which the format lets be filled with spaces.
    """

    def __init__(self, file: Path, header: int) -> None:
        self.entries: dict[str, Any] = {}
        self.size = 0
        self._room = header
        self._file = file.open("wb")
        self._file.seek(8 + header)

    def add(self, name: str, weight: Tensor) -> None:
        start, self.size = self.size, self.size + weight.nbytes
        self.entries[name] = {
            "dtype": SAFETENSORS_TYPES[weight.dtype],
            "shape": [*weight.shape],
            "data_offsets": [start, self.size],
        }
        # A view of the weight's memory; a mapped weight goes from file to file.
        self._file.write(weight.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.entries}, separators=(",", ":")).encode()
        assert len(header) <= self._room
        with self._file as file:
            file.seek(0)
            file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))

    def abandon(self) -> None:
        """Let go of the file when something went wrong, full disk or not."""
        with suppress(OSError):
            self._file.close()


def _return_memory() -> None:
    """Give freed memory back to the operating system.

    glibc keeps that of past weights, and small objects that settle in it leave too little room for the next one: in
    the end a whole model is kept. Nothing is done where the C library has no such call.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def header_size(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Room for the header of a file with all of these weights, a multiple of 8 as the format asks for."""
    longest = {"dtype": "BOOL", "data_offsets": [10**14] * 2}
    size = sum(len(json.dumps({name: {"shape": shape, **longest}})) for name, shape in shapes)
    return (size + 64 + 7) // 8 * 8


def write_weights(weights: Iterator[tuple[str, Tensor]], folder: Path, header: int) -> set[str]:
    """One safetensors file, or several with an index, as transformers saves them. Returns the types of the weights.

    `header` is the room that the header of a file with all weights takes.
    """
    shards = [_Shard(folder / "shard-0", header)]
    dtypes: set[str] = set()
    kept = 0
    try:
        for name, weight in weights:
            kept += weight.nbytes
            if kept > KEPT_BYTES:
                kept = 0
                _return_memory()
            if shards[-1].size and shards[-1].size + weight.nbytes > SHARD_BYTES:
                shards[-1].close()
                shards.append(_Shard(folder / f"shard-{len(shards)}", header))
            shards[-1].add(name, weight)
            dtypes.add(str(weight.dtype).removeprefix("torch."))
        shards[-1].close()
    finally:
        shards[-1].abandon()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return dtypes
    index: dict[str, str] = {}
    for place, shard in enumerate(shards):
        file = f"model-{place + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{place}").rename(folder / file)
        index |= dict.fromkeys(shard.entries, file)
    content = {"metadata": {"total_size": sum(shard.size for shard in shards)}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2))
    return dtypes
