"""Model Stock: the interpolation ratio between the base and the models' mean follows from their angles
(https://arxiv.org/abs/2403.19522, section 4)."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmevo.merging.kernels.blocks import task_vectors
from llmevo.merging.kernels.gram import gram, gram_by_row, weighted_sum_by_row
from llmevo.merging.kernels.task_vectors import weighted_sum
from llmevo.merging.methods.base import TensorGroup


def model_stock(inputs: TensorGroup) -> Tensor:
    """Return base + t · mean task vector, with t = N·cos θ / (1 + (N - 1)·cos θ) for the mean angle θ between two of N.

    One θ a tensor; with `filter_wise` one a row. One model alone has no angle to another: it is taken as it is.
    """
    many = len(inputs.models)
    if many == 1:
        return weighted_sum(inputs.models, [1.0], None, inputs.dtype)
    if not inputs.shared["filter_wise"]:
        share = float(_ratio(gram(inputs, origin=True))) / many
        return weighted_sum(inputs.models, [share] * many, inputs.origin, inputs.dtype)
    shape, operands = inputs.origin.shape, task_vectors(inputs)
    products = inputs.keep("gram by row", lambda: gram_by_row(operands, inputs.origin, shape))
    shares = np.repeat(_ratio(products)[:, None] / many, many, axis=1)
    return weighted_sum_by_row(operands, shares, inputs.origin, shape, inputs.dtype)


def _ratio(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return t, from the inner products (..., n, n) of the task vectors; 0, the base, where the formula has a pole."""
    many = products.shape[-1]
    lengths = np.sqrt(np.maximum(np.diagonal(products, axis1=-2, axis2=-1), 0.0))
    first, second = np.triu_indices(many, 1)
    lengths_product = np.maximum(lengths[..., first] * lengths[..., second], 1e-6)
    cosine = np.clip(products[..., first, second] / lengths_product, -1.0, 1.0).mean(axis=-1)
    below = 1.0 + (many - 1) * cosine
    pole = np.abs(below) < 1e-6
    return np.where(pole, 0.0, many * cosine / np.where(pole, 1.0, below))
