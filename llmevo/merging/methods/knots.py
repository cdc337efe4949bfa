"""KnOTS: trim and elect signs in a basis that all task vectors share (https://arxiv.org/abs/2410.19735, section 4)."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmevo.merging.kernels import spectral
from llmevo.merging.kernels.spectral import Arrays, Matrix, Product
from llmevo.merging.kernels.task_vectors import weighted_sum
from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.methods.task_arithmetic import task_arithmetic


def knots(inputs: TensorGroup) -> Tensor:
    """Return base + λ·((1 - blend) Σ wᵢδᵢ + blend·UΣ ties(w₁V₁, …, wₙVₙ)), with [δ₁ … δₙ] = UΣ[V₁ … Vₙ].

    `ties` keeps the `density` share of each Vᵢ's entries that is largest in magnitude, and of these the ones that
    agree with the sign of the sum; with `normalize` it divides by the weights of those that agree. Blend 0 is task
    arithmetic; so are tensors that are no matrices, a model alone, and what full fine-tunes have beyond their largest
    directions.
    """
    blend, density = inputs.shared["blend"], inputs.shared["density"]
    if blend == 0.0 or not spectral.is_separable(inputs):
        return task_arithmetic(inputs)
    places, scale = spectral.used(inputs), spectral.factor(inputs)
    weights = [inputs.each["weight"][place] for place in places]
    with spectral.one_thread():
        left, *aligned = inputs.keep_latest("aligned", places, lambda: _aligned(inputs))
        merged = _ties(aligned, weights, density, bool(inputs.shared["normalize"])) * inputs.shared["lambda"]
        plain = np.sum([weight * scale * each for weight, each in zip(weights, aligned, strict=True)], axis=0)
    change = spectral.low_rank(inputs.origin, Product(left, blend * (merged - plain)))
    models = [*(inputs.models[place] for place in places), change]
    return weighted_sum(models, [*(weight * scale for weight in weights), 1.0], inputs.origin, inputs.dtype)


def _aligned(inputs: TensorGroup) -> Arrays:
    """Return UΣ (rows, rank), and Vᵢ (rank, columns) of each used model."""
    found = spectral.vectors(inputs)
    basis, triangle = np.linalg.qr(np.concatenate([each.left for each in found], axis=1, dtype=np.float64))
    places = np.split(triangle, np.cumsum([len(each.values) for each in found])[:-1], axis=1)
    inner = [(place * each.values) @ each.right for place, each in zip(places, found, strict=True)]
    squares, u = np.linalg.eigh(np.sum([each @ each.T for each in inner], axis=0))
    kept = squares > 1e-12 * max(float(squares[-1]), 0.0) if len(squares) else np.zeros(0, bool)
    values, u = np.sqrt(squares[kept]), u[:, kept]
    return Arrays((basis @ (u * values), *((u.T @ each) / values[:, None] for each in inner)))


def _ties(aligned: list[Matrix], weights: list[float], density: float, normalize: bool) -> Matrix:
    trimmed = np.stack([_trim(each, density) for each in aligned])
    scales = np.array(weights)[:, None, None]
    total = (scales * trimmed).sum(axis=0)
    agree: NDArray[np.bool_] = (np.sign(scales * trimmed) == np.where(total >= 0.0, 1.0, -1.0)) & (trimmed != 0.0)
    elected = (scales * trimmed * agree).sum(axis=0)
    shares = np.abs(scales * agree).sum(axis=0)
    return elected / np.where(shares > 0.0, shares, 1.0) if normalize else elected


def _trim(matrix: Matrix, density: float) -> Matrix:
    """Return the matrix with the `density` share of its entries, at least one, that is largest in magnitude."""
    count = max(1, int(density * matrix.size))
    if count >= matrix.size:
        return matrix
    least = np.partition(np.abs(matrix), matrix.size - count, axis=None)[matrix.size - count]
    return np.where(np.abs(matrix) >= least, matrix, 0.0)
