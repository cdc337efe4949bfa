"""Karcher mean: the point of the sphere with the least squared distance to all models, along the sphere
(https://arxiv.org/abs/2603.04972)."""

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmevo.merging.kernels.gram import gram
from llmevo.merging.kernels.task_vectors import weighted_sum
from llmevo.merging.methods.base import TensorGroup


def karcher(inputs: TensorGroup) -> Tensor:
    """Return the Karcher mean of the models' directions, with their mean length.

    Models of (almost) no length have no direction and are left out; without any direction it is the plain mean, where
    mergekit has zeros.
    """
    many, tolerance = len(inputs.models), max(inputs.shared["tol"], 0.0)
    products = gram(inputs, origin=False)
    lengths = np.sqrt(np.maximum(np.diagonal(products), 0.0))
    valid = np.flatnonzero(lengths > tolerance)
    if many == 1 or not len(valid):
        return weighted_sum(inputs.models, [1.0 / many] * many, None, inputs.dtype)
    units = products[np.ix_(valid, valid)] / np.outer(lengths[valid], lengths[valid])
    scales = np.zeros(many)
    scales[valid] = _mean(units, int(inputs.shared["max_iter"]), tolerance) * lengths.mean() / lengths[valid]
    return weighted_sum(inputs.models, scales.tolist(), None, inputs.dtype)


def _mean(units: NDArray[np.float64], iterations: int, tolerance: float) -> NDArray[np.float64]:
    """Return the Karcher mean of unit vectors with these inner products, as the factors of a sum of them.

    Each step follows the average of the directions to all vectors.
    """
    share = 1.0 / len(units)
    # Closer than this an angle in float64 is rounding; a vector on the far side of the sphere has no direction.
    least = max(tolerance, 1e-7)
    mean = np.full(len(units), share)
    if _length(mean, units) < least:
        # The vectors balance out: start at one of them.
        mean = np.eye(len(units))[0]
    mean /= _length(mean, units)
    for _ in range(iterations):
        cosines = np.clip(units @ mean, -1.0, 1.0)
        angles = np.arccos(cosines)
        pulls = np.where((angles > least) & (math.pi - angles > least), angles / np.maximum(np.sin(angles), 1e-8), 0.0)
        tangent = share * (pulls - float(pulls @ cosines) * mean)
        step = _length(tangent, units)
        if step < least:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean /= max(_length(mean, units), 1e-8)
    return mean


def _length(factors: NDArray[np.float64], units: NDArray[np.float64]) -> float:
    return math.sqrt(max(float(factors @ units @ factors), 0.0))
