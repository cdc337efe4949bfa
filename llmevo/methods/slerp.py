"""SLERP: walk from one model to another along the sphere (https://en.wikipedia.org/wiki/Slerp)."""

import math

from torch import Tensor

from llmevo.methods.base import Inputs, Method, Parameter, dense

NEARLY_PARALLEL = 0.9995
"""Above this cosine the arc is a line, as in mergekit; fine-tunes of one base are nearly always there."""


def slerp(inputs: Inputs) -> Tensor:
    """From the base (t = 0) to the other model (t = 1), each tensor taken as one long vector."""
    assert inputs.base is not None
    (only,) = inputs.tensors
    t, start, other = inputs.shared["t"], inputs.base, dense(only)
    lengths = [float(tensor.norm()) for tensor in (start, other)]
    # A vector of (almost) no length has no direction; mergekit leaves it as it is, and so does this.
    scale = math.prod(length if length > 1e-8 else 1.0 for length in lengths)
    cosine = float(start.flatten() @ other.flatten()) / scale
    if abs(cosine) > NEARLY_PARALLEL:
        return start * (1 - t) + other * t
    angle = math.acos(cosine)
    return start * (math.sin((1 - t) * angle) / math.sin(angle)) + other * (math.sin(t * angle) / math.sin(angle))


SLERP = Method(
    name="slerp",
    merge=slerp,
    paper="https://en.wikipedia.org/wiki/Slerp",
    each={},
    shared={"t": Parameter(default=None, low=0.0, high=1.0)},
    pair=True,
)
