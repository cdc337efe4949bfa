"""Memory for results, used again once nobody holds a result any more.

The system clears every page it hands out, which for a merged weight takes as long as merging it. The weights of one
candidate have the shapes of the last one's, so its memory serves again.
"""

import weakref
from collections.abc import Sequence
from math import prod
from threading import RLock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SMALLEST = 1 << 16
"""Bytes under which the allocator's own memory does as well."""

MOST = 1 << 28
"""Bytes that are kept at most while nobody uses them."""


class Buffers:
    """Gives out tensors and takes their memory back when the last view of it is gone."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._free: dict[int, list[NDArray[np.uint8]]] = {}
        self.idle = 0
        """Bytes that are kept and not used."""
        # Reentrant: the end of a tensor may come, by garbage collection, while its own thread is in here.
        self._lock = RLock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of bfloat16 or float32, whose entries are whatever stood there before."""
        size = prod(shape) * dtype.itemsize
        if size < SMALLEST:
            return torch.empty([*shape], dtype=dtype)
        memory = self._reused(size)
        if memory is None:
            memory = np.empty(size, np.uint8)
        # The tensor holds this view, so its end is the end of the tensor.
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


BUFFERS = Buffers()
"""The process's own: results of all merges come from here."""
