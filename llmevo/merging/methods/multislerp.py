"""Multi-SLERP: the weighted mean of any number of models on the sphere
(https://goddard.blog/posts/multislerp-wow-what-a-cool-idea)."""

import numpy as np
from torch import Tensor

from llmevo.merging.kernels.gram import gram
from llmevo.merging.kernels.task_vectors import weighted_sum
from llmevo.merging.methods.base import TensorGroup, divisor

NEARLY_BALANCED = 1e-6
"""Weighted directions that sum to a vector shorter than this cancel out: the rest is rounding."""


def multislerp(inputs: TensorGroup) -> Tensor:
    """Return the weighted mean of the models' directions, with the weighted mean of their lengths.

    With a base model it is the mean of task vectors. One model is itself, whatever its weight. Where the directions
    cancel out it is Σ wᵢxᵢ: mergekit does that for two models, and gives up for more.
    """
    if len(inputs.models) == 1:
        return weighted_sum(inputs.models, [1.0], None, inputs.dtype)
    weights = np.array(inputs.each["weight"])
    if inputs.shared["normalize_weights"]:
        weights /= divisor(inputs.each["weight"])
    products = gram(inputs, origin=inputs.base is not None)
    lengths = np.sqrt(np.maximum(np.diagonal(products), 0.0))
    directed = weights / np.maximum(lengths + inputs.shared["eps"], 1e-30)
    # mergekit maps the models to the tangent space at this mean, where their own mean is 0 by construction: the way
    # back along the sphere ends where it began, at the mean itself.
    mean = np.sqrt(max(float(directed @ products @ directed), 0.0))
    if mean < max(NEARLY_BALANCED, inputs.shared["eps"]):
        scales = weights
    else:
        scales = directed * (float(weights @ lengths) / mean)
    return weighted_sum(inputs.models, scales.tolist(), inputs.base, inputs.dtype)
