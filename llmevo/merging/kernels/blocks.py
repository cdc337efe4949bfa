"""Tensors block by block: every block stays in the processor's cache from reading to rounding.

The memory of results is reused: the system clears every page that it hands out, which takes as long as merging a
weight, and the weights of one candidate have the shapes of the last one's.
"""

import math
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmevo.merging.kernels.loops import Floats, Stored, narrow, widen
from llmevo.merging.methods.base import TensorGroup
from llmevo.models.checkpoints import LowRank, Weight, same

Result = TypeVar("Result")
BLOCK = 1 << 16
"""Entries of a block: a few rows of 256 KiB fit a core's cache. Sums are made block by block, so it is a constant."""

SMALLEST = 1 << 16
"""Bytes below which the allocator's own memory is as fast."""

MOST = 1 << 28
"""The most bytes that are kept unused."""


class Buffers:
    """Memory for tensors, reused when the last view of it is gone."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self.idle = 0
        """Bytes that are kept unused."""
        # Reentrant: garbage collection may end a tensor while its own thread holds the lock.
        self._lock = threading.RLock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of bfloat16 or float32 with arbitrary entries."""
        size = math.prod(shape) * dtype.itemsize
        if size < SMALLEST:
            return torch.empty([*shape], dtype=dtype)
        memory = self._reused(size)
        if memory is None:
            memory = np.empty(size, np.uint8)
        # The tensor holds this view, so it ends with the tensor.
        lease = memory.view(np.int16 if dtype == torch.bfloat16 else np.float32).reshape([*shape])
        weakref.finalize(lease, self._take_back, memory).atexit = False
        tensor = torch.from_numpy(lease)
        return tensor.view(dtype) if dtype == torch.bfloat16 else tensor

    def _reused(self, size: int) -> NDArray[np.uint8] | None:
        with self._lock:
            if not self._free.get(size):
                return None
            self.idle -= size
            return self._free[size].pop()

    def _take_back(self, memory: NDArray[np.uint8]) -> None:
        with self._lock:
            if self.idle + memory.nbytes <= self._most:
                self.idle += memory.nbytes
                self._free.setdefault(memory.nbytes, []).append(memory)


_THREAD = threading.local()
BUFFERS = Buffers()
"""The memory of the results of all merges of the process."""


class Scratch:
    """Working rows of float32, made once for many blocks."""

    def __init__(self) -> None:
        self._rows: Floats = np.empty((0, 0), np.float32)

    def rows(self, count: int, size: int) -> Floats:
        """Return `count` rows as one array with arbitrary entries."""
        if self._rows.shape != (count, size):
            self._rows = np.empty((count, size), np.float32)
        return self._rows


def over_blocks(size: int, work: Callable[[int, int, Scratch], Result]) -> list[Result]:
    """Call `work(start, stop, scratch)` for every block of `size` entries, on all cores; results in order."""

    def part(starts: range) -> list[Result]:
        scratch = Scratch()
        return [work(start, min(start + BLOCK, size), scratch) for start in starts]

    return in_parts(range(0, size, BLOCK), part)


def in_parts(items: range, part: Callable[[range], list[Result]]) -> list[Result]:
    """Call `part` for consecutive items, on as many threads as torch uses; return all results in order."""
    if not items:
        return []  # an empty tensor
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1 or getattr(_THREAD, "whole", False):
        return part(items)
    bounds = [len(items) * i // threads for i in range(threads + 1)]
    others = [_pool(os.getpid(), threads - 1).submit(part, items[i:j]) for i, j in pairwise(bounds[1:])]
    results = part(items[: bounds[1]])
    for other in others:
        results.extend(other.result())
    return results


def in_background(work: Callable[[], Result]) -> Callable[[], Result]:
    """Start work on one of several small tensors on a thread; return a function that waits for the result.

    One thread for each tensor keeps all cores busy; threads that share a small tensor wait for one another.
    """
    return _workers(os.getpid(), torch.get_num_threads()).submit(work).result


@cache
def _workers(_process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "merge-tensors", initializer=lambda: setattr(_THREAD, "whole", True))


@cache
def _pool(_process: int, threads: int) -> ThreadPoolExecutor:
    """Return the pool of this process: a fork has no threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="merge")


def flat(tensor: Tensor) -> Stored:
    """Return a tensor's memory as one row, without a copy if it is stored as bfloat16 or float32."""
    row: Any = _readable(tensor).view(-1)
    return row.view(torch.uint16).numpy() if row.dtype == torch.bfloat16 else row.numpy()


def _readable(tensor: Tensor) -> Tensor:
    """Return the same entries, contiguous, as bfloat16 or float32."""
    # Every operation of torch releases the interpreter to another thread, so none is called without need.
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype not in (torch.bfloat16, torch.float32):
        tensor = tensor.to(torch.float32)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a new tensor to round into; float32 for types without a kernel (float16)."""
    return BUFFERS.empty(shape, dtype if dtype == torch.bfloat16 else torch.float32)


@dataclass(frozen=True)
class Operand:
    """One model's task vector (or, without a base, weight), read block by block."""

    weight: Tensor
    """Contiguous, as bfloat16 or float32."""
    less_base: bool
    """True if the base is still to be subtracted."""

    @classmethod
    def of(cls, weight: Tensor, less_base: bool = False) -> "Operand":
        return cls(_readable(weight), less_base)

    @cached_property
    def stored(self) -> Stored:
        """Its memory as one row."""
        return flat(self.weight)

    @property
    def size(self) -> int:
        return self.weight.numel()

    def read(self, start: int, stop: int, origin: Floats, row: Floats) -> None:
        """Read entries `start` to `stop` into `row`; `origin` are the base's entries there."""
        widen(self.stored[start:stop], row)
        if self.less_base:
            row -= origin


def task_vectors(inputs: TensorGroup) -> list[Operand]:
    """Return every model's task vector."""

    def task_vector(model: int, weight: Weight) -> Operand:
        if isinstance(weight, LowRank) and same(weight.origin, inputs.origin):
            return Operand.of(inputs.delta(model))
        return Operand.of(weight.dense() if isinstance(weight, LowRank) else weight, less_base=True)

    return [task_vector(model, weight) for model, weight in enumerate(inputs.models)]


def weights(inputs: TensorGroup) -> list[Operand]:
    """Return every model's weight."""
    return [Operand.of(w if isinstance(w, Tensor) else w.dense()) for w in inputs.models]


def read_all(
    operands: Sequence[Operand], origin: Stored | None, start: int, stop: int, scratch: Scratch | None = None
) -> tuple[Floats, Floats]:
    """Read a block of all task vectors (or weights, without a base), a row each, and of the base (0 without one)."""
    block = (scratch or Scratch()).rows(len(operands) + 1, stop - start)
    rows, base = block[:-1], block[-1]
    if origin is None:
        base.fill(0.0)
    else:
        widen(origin[start:stop], base)
    for row, operand in zip(rows, operands, strict=True):
        operand.read(start, stop, base, row)
    return rows, base


def merge_blocks(
    inputs: TensorGroup, operands: Sequence[Operand], kernel: Callable[[int, int, Floats, Floats], None]
) -> Tensor:
    """Merge by a kernel on blocks.

    `kernel(start, stop, rows, total)` gets all task vectors (or weights), one a row, and changes `total`, the base's
    entries, to the result.
    """
    origin, merged = flat(inputs.origin), empty(inputs.origin.shape, inputs.dtype)
    out = flat(merged)

    def work(start: int, stop: int, scratch: Scratch) -> None:
        rows, total = read_all(operands, origin, start, stop, scratch)
        kernel(start, stop, rows, total)
        narrow(total, out[start:stop])

    over_blocks(merged.numel(), work)
    return merged


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """Return the number and length of a tensor's rows: rows are its last dimension, a scalar is one row."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def columns_of(shape: Sequence[int]) -> tuple[int, int]:
    """Return the length and number of a tensor's columns: columns are its first dimension, a scalar is one column."""
    return shape[0] if shape else 1, math.prod(shape[1:])


def over_rows(rows: int, columns: int, work: Callable[[slice, slice], Result]) -> list[Result]:
    """Call `work(rows, entries)` for blocks of whole rows, on all cores; results in order."""
    several = max(1, BLOCK // max(1, columns))

    def part(firsts: range) -> list[Result]:
        bounds = [(first, min(first + several, rows)) for first in firsts]
        return [work(slice(first, last), slice(first * columns, last * columns)) for first, last in bounds]

    return in_parts(range(0, rows if columns else 0, several), part)
