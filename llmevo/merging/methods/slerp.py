"""SLERP: spherical interpolation between two models (https://en.wikipedia.org/wiki/Slerp)."""

import math

from torch import Tensor

from llmevo.merging.kernels.gram import gram_with_base
from llmevo.merging.kernels.task_vectors import weighted_sum
from llmevo.merging.methods.base import TensorGroup

NEARLY_PARALLEL = 0.9995
"""Above this cosine the arc is a line, as in mergekit; fine-tunes of one base are nearly always there."""


def slerp(inputs: TensorGroup) -> Tensor:
    """Return the point at t on the arc from the base (t = 0) to the other model (t = 1), tensors as vectors."""
    t, products = inputs.shared["t"], gram_with_base(inputs)
    lengths = [math.sqrt(products[i, i]) for i in range(2)]
    # A vector of (almost) no length has no direction; it stays as it is, as in mergekit.
    cosine = products[0, 1] / math.prod(length if length > 1e-8 else 1.0 for length in lengths)
    if abs(cosine) > NEARLY_PARALLEL:
        scales = [1 - t, t]
    else:
        angle = math.acos(cosine)
        scales = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    return weighted_sum([inputs.origin, *inputs.models], scales, None, inputs.dtype)
