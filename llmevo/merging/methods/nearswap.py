"""NearSwap: take over from the other model what is near the base already
(https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001)."""

import numpy as np
from torch import Tensor

from llmevo.merging.kernels.blocks import Scratch, empty, flat, over_blocks, weights
from llmevo.merging.kernels.steps import Floats, compiled, narrow, widen
from llmevo.merging.methods.base import TensorGroup


def nearswap(inputs: TensorGroup) -> Tensor:
    """Every entry of the base moves by `t` towards the other model's, or all the way where that is nearer."""
    origin, (other,) = flat(inputs.origin), weights(inputs)
    t = np.float32(max(inputs.shared["t"], 0.0))
    merged = empty(inputs.origin.shape, inputs.dtype)
    out = flat(merged)

    def work(start: int, stop: int, scratch: Scratch) -> None:
        total, row = scratch.row(0, stop - start), scratch.row(1, stop - start)
        widen(origin[start:stop], total)
        other.read(start, stop, None, row)
        _swap(row, t, total)
        narrow(total, out[start:stop])

    over_blocks(merged.numel(), work)
    return merged


@compiled
def _swap(other: Floats, t: np.float32, total: Floats) -> None:
    for i in range(len(total)):
        difference = other[i] - total[i]
        # mergekit's least distance: a t below it is not divided by less.
        far = max(abs(difference), np.float32(1e-6))
        total[i] = other[i] if t >= far else total[i] + t / far * difference
