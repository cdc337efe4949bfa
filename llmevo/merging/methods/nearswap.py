"""NearSwap: take over from the other model what is near the base already
(https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001)."""

import numpy as np
from torch import Tensor

from llmevo.merging.kernels.blocks import merge_blocks, weights
from llmevo.merging.kernels.loops import Floats, compiled
from llmevo.merging.methods.base import TensorGroup


def nearswap(inputs: TensorGroup) -> Tensor:
    """Move every entry of the base by `t` towards the other model's, or all the way where that is nearer."""
    t = np.float32(max(inputs.shared["t"], 0.0))
    return merge_blocks(inputs, weights(inputs), lambda _start, _stop, rows, total: _swap(rows[0], t, total))


@compiled
def _swap(other: Floats, t: np.float32, total: Floats) -> None:
    for i in range(len(total)):
        difference = other[i] - total[i]
        # mergekit's least distance: a t below it is not divided by less.
        far = max(abs(difference), np.float32(1e-6))
        total[i] = other[i] if t >= far else total[i] + t / far * difference
