"""Tensors taken block by block: every block stays in the processor's cache from reading to rounding."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from llmevo.merging.kernels.buffers import BUFFERS
from llmevo.merging.kernels.steps import Floats, Stored, subtract, widen
from llmevo.merging.methods.base import TensorGroup
from llmevo.models.weights import LowRank, Weight, same

Result = TypeVar("Result")

BLOCK = 1 << 16
"""Entries of a block: a few rows of 256 KiB fit a core's cache. Sums are made block by block, so it is a constant."""


class Scratch:
    """Rows of float32 to work in, made once for many blocks."""

    def __init__(self) -> None:
        self._rows: dict[int, Floats] = {}

    def row(self, place: int, size: int) -> Floats:
        if place not in self._rows:
            self._rows[place] = np.empty(BLOCK, np.float32)
        return self._rows[place][:size]

    def rows(self, count: int, size: int) -> Floats:
        """Several rows as one array."""
        key = -count
        if key not in self._rows or self._rows[key].shape[1] != size:
            self._rows[key] = np.empty((count, size), np.float32)
        return self._rows[key]


def over_blocks(size: int, work: Callable[[int, int, Scratch], Result]) -> list[Result]:
    """`work(start, stop, scratch)` for every block of a tensor of `size` entries, on all cores; results in order."""

    def part(starts: range) -> list[Result]:
        scratch = Scratch()
        return [work(start, min(start + BLOCK, size), scratch) for start in starts]

    return in_parts(range(0, size, BLOCK), part)


def in_parts(items: range, part: Callable[[range], list[Result]]) -> list[Result]:
    """`part` of consecutive items, on as many threads as torch uses; all results in the order of the items."""
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
    """Begin to work on one of several small tensors, on a thread of its own; returns what waits for the result.

    Sharing out whole tensors keeps all cores busy where sharing out each one would have them wait for one another.
    """
    return _workers(os.getpid(), torch.get_num_threads()).submit(work).result


_THREAD = threading.local()


@cache
def _workers(_process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "merge-tensors", initializer=lambda: setattr(_THREAD, "whole", True))


@cache
def _pool(_process: int, threads: int) -> ThreadPoolExecutor:
    """One for each process: threads do not live on in a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="merge")


def flat(tensor: Tensor) -> Stored:
    """A tensor's memory as one row, without a copy where it is stored as bfloat16 or float32."""
    row: Any = _readable(tensor).view(-1)
    return row.view(torch.uint16).numpy() if row.dtype == torch.bfloat16 else row.numpy()


def _readable(tensor: Tensor) -> Tensor:
    """The same entries in one piece, as bfloat16 or float32."""
    # Every operation of torch hands the interpreter to another thread, so none is done that changes nothing.
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype not in (torch.bfloat16, torch.float32):
        tensor = tensor.to(torch.float32)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A new tensor to round into; float32 for types that have no kernel (float16)."""
    return BUFFERS.empty(shape, dtype if dtype == torch.bfloat16 else torch.float32)


@dataclass(frozen=True)
class Operand:
    """One model's task vector (or, without a base, weight), to be read block by block."""

    weight: Tensor
    """In one piece, as bfloat16 or float32."""
    less_base: bool
    """Whether the base is still to be subtracted."""

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

    def read(self, start: int, stop: int, origin: Floats | None, row: Floats) -> None:
        """Entries `start` to `stop` into `row`; `origin` are the base's entries there."""
        widen(self.stored[start:stop], row)
        if self.less_base:
            assert origin is not None
            subtract(origin, row)


def task_vectors(inputs: TensorGroup) -> list[Operand]:
    """Every model's task vector."""
    return [_task_vector(inputs, model, weight) for model, weight in enumerate(inputs.models)]


def _task_vector(inputs: TensorGroup, model: int, weight: Weight) -> Operand:
    if isinstance(weight, LowRank):
        if same(weight.origin, inputs.origin):
            return Operand.of(inputs.delta(model))
        return Operand.of(weight.dense(), less_base=True)
    return Operand.of(weight, less_base=True)


def weights(inputs: TensorGroup) -> list[Operand]:
    """Every model's weight."""
    return [Operand.of(w if isinstance(w, Tensor) else w.dense()) for w in inputs.models]
