"""NuSLERP: walk along the sphere between two models, or between their task vectors
(https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md#nuslerp)."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmevo.merging.kernels import blocks
from llmevo.merging.kernels.gram import gram, gram_by_column, gram_by_row, weighted_sum_by_row
from llmevo.merging.kernels.task_vectors import weighted_sum
from llmevo.merging.methods.base import TensorGroup

NEARLY_COLINEAR = 1e-7
"""Under this squared sine the arc is a line. Between parallel vectors no float32 tells the two apart; between opposite
ones there is no single arc, and mergekit's comes to a line at about this angle by rounding."""


def nuslerp(inputs: TensorGroup) -> Tensor:
    """Return the point on the arc from the first model to the second, at the second's share of the weights.

    A tensor is one vector, or without `nuslerp_flatten` many: its rows, or with `nuslerp_row_wise` (mergekit's name)
    its columns. With a base model the arc is between task vectors. Weights that cancel out give the middle.
    """
    weights = inputs.each["weight"]
    total = sum(weights)
    t = weights[1] / total if abs(total) >= 1e-6 else 0.5
    if inputs.shared["nuslerp_flatten"]:
        scales = _arc(gram(inputs, origin=inputs.base is not None), t)
        return weighted_sum(inputs.models, [float(scale) for scale in scales], inputs.base, inputs.dtype)
    first, by_column = inputs.models[0], bool(inputs.shared["nuslerp_row_wise"])
    shape = (first if isinstance(first, Tensor) else first.origin).shape
    what, make = ("gram by column", gram_by_column) if by_column else ("gram by row", gram_by_row)
    operands = blocks.weights(inputs) if inputs.base is None else blocks.task_vectors(inputs)
    products = inputs.keep(what, lambda: make(operands, inputs.base, shape))
    return weighted_sum_by_row(operands, _arc(products, t), inputs.base, shape, inputs.dtype, by_column)


def _arc(products: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    """Return the factors (..., 2) of two vectors with these inner products (..., 2, 2)."""
    lengths = np.sqrt(np.maximum(np.diagonal(products, axis1=-2, axis2=-1), 0.0))
    cosine = np.clip(products[..., 0, 1] / np.maximum(lengths, 1e-7).prod(axis=-1), -1.0, 1.0)
    line = 1.0 - cosine**2 <= NEARLY_COLINEAR
    angle = np.arccos(np.where(line, 0.0, cosine))
    arc = np.stack([np.sin((1.0 - t) * angle), np.sin(t * angle)], axis=-1) / np.sin(angle)[..., None]
    return np.where(line[..., None], np.array([1.0 - t, t]), arc)
