"""Write weights into safetensors files, one weight at a time: only a few are in memory at once."""

import ctypes
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from llmevo.models.checkpoints import FLOATS, INTEGERS, LowRank, Weight

Named = TypeVar("Named", bound=Weight)

SHARD_BYTES = 5 * 10**9
"""The largest size of a weight file, except for a single larger weight; as in mergekit."""

KEPT_BYTES = 50 * 10**6
"""Bytes of weights, as float32, between two returns of freed memory."""

SAFETENSORS_TYPES: dict[torch.dtype, str] = {
    getattr(torch, name): kind for kind, name in (FLOATS | INTEGERS | {"F8_E4M3": "float8_e4m3fn"}).items()
}


class WeightFile:
    """One safetensors file, written a weight at a time; complete at the end of a `with` block that raises nothing.

    Its header comes first but is known last: room is reserved, and padded with spaces.
    """

    def __init__(self, file: Path, header: int) -> None:
        """`header` is the room for it: see `header_size`."""
        self.entries: dict[str, Any] = {}
        self.size = 0
        self._room = header
        self.file = file.open("wb")
        self.file.seek(8 + header)

    def add(self, name: str, weight: Tensor) -> None:
        start, self.size = self.size, self.size + weight.nbytes
        self.entries[name] = {
            "dtype": SAFETENSORS_TYPES[weight.dtype],
            "shape": [*weight.shape],
            "data_offsets": [start, self.size],
        }
        # A view of the weight's memory: a mapped weight goes from file to file.
        self.file.write(weight.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}, **self.entries}, separators=(",", ":")).encode()
        assert len(header) <= self._room
        with self.file as file:
            file.seek(0)
            file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))

    def abandon(self) -> None:
        """Close the file, complete or not."""
        with suppress(OSError):  # a full disk fails again on closing
            self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abandon()


def _return_memory() -> None:
    """Return freed memory to the operating system, where the C library can.

    glibc keeps the memory of past weights, and small objects in it leave too little room for the next one: without this
    call a whole model stays in memory.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def returning_memory(weights: Iterable[tuple[str, Named]]) -> Iterator[tuple[str, Named]]:
    """Yield the same weights, and return freed memory now and then."""
    kept = 0
    for name, weight in weights:
        yield name, weight
        kept += 4 * (weight.origin if isinstance(weight, LowRank) else weight).numel()  # most is computed in float32
        if kept > KEPT_BYTES:
            kept = 0
            _return_memory()


def header_size(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Return the room for the header of a file with all of these weights, a multiple of 8 as the format requires."""
    longest = {"dtype": "F8_E4M3", "data_offsets": [10**14] * 2}
    size = sum(len(json.dumps({name: {"shape": shape, **longest}})) for name, shape in shapes)
    return (size + 64 + 7) // 8 * 8


def write_file(weights: Iterable[tuple[str, Tensor]], file: Path, header: int) -> None:
    """Write one safetensors file of any size. `header` is the room for its header."""
    with WeightFile(file, header) as out:
        for name, weight in returning_memory(weights):
            out.add(name, weight)


def write_weights(weights: Iterator[tuple[str, Tensor]], folder: Path, header: int) -> set[str]:
    """Write one safetensors file, or several with an index, as transformers does. Returns the types of the weights.

    `header` is the room for the header of a file with all weights.
    """
    shards = [WeightFile(folder / "shard-0", header)]
    dtypes: set[str] = set()
    try:
        for name, weight in returning_memory(weights):
            if shards[-1].size and shards[-1].size + weight.nbytes > SHARD_BYTES:
                shards[-1].close()
                shards.append(WeightFile(folder / f"shard-{len(shards)}", header))
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
