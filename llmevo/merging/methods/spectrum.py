"""Methods that change the singular values of the merged task vector: isotropic merging and subspace boosting."""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from llmevo.merging.kernels import spectral
from llmevo.merging.kernels.spectral import Arrays, Matrix, Product
from llmevo.merging.kernels.task_vectors import weighted_sum
from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.methods.task_arithmetic import task_arithmetic


def isotropic(inputs: TensorGroup) -> Tensor:
    """Return base + U diag(σ') Vᵀ for λ Σ wᵢδᵢ = U diag(σ) Vᵀ, with σ'ₖ = c·σ̄^(1 - gamma)·σₖ^gamma.

    σ̄ is the mean of σ, and c keeps Σσ². Gamma 0 makes all directions equally strong, as Iso-C does
    (https://arxiv.org/abs/2502.04959, equation 5); gamma 1 is task arithmetic.
    """
    gamma = inputs.shared["gamma"]

    def flattened(values: Matrix) -> Matrix:
        largest = values.max()
        if not largest:
            return values
        shares = values / largest  # the squares of tiny values would underflow
        flat = shares.mean() ** (1.0 - gamma) * shares**gamma
        return largest * flat * np.sqrt(np.square(shares).sum() / np.square(flat).sum())

    return _changed(inputs, flattened) if gamma < 1.0 else task_arithmetic(inputs)


def subspace_boosting(inputs: TensorGroup) -> Tensor:
    """Return base + U diag(σ') Vᵀ for λ Σ wᵢδᵢ = U diag(σ) Vᵀ, with small singular values raised.

    Those after the first ones that hold the share `beta` of Σσ are raised to the last of these
    (https://arxiv.org/abs/2506.16506, algorithm 1). Beta 1 is task arithmetic.
    """
    beta = inputs.shared["beta"]

    def boosted(values: Matrix) -> Matrix:
        sums = np.cumsum(values)
        return np.maximum(values, values[min(int(np.searchsorted(sums, beta * sums[-1])), len(values) - 1)])

    return _changed(inputs, boosted) if beta < 1.0 else task_arithmetic(inputs)


def _changed(inputs: TensorGroup, change: Callable[[Matrix], Matrix]) -> Tensor:
    """Return the merge by task arithmetic with other singular values, in the span of the models' largest directions.

    What full fine-tunes have beyond these (see `spectral.vectors`) is added as it is.
    """
    if not spectral.is_separable(inputs):
        return task_arithmetic(inputs)
    places, scale = spectral.used(inputs), spectral.factor(inputs)
    weights = [inputs.each["weight"][place] * scale for place in places]
    models = [inputs.models[place] for place in places]
    with spectral.one_thread():
        left, right, core_left, core_right, values = inputs.keep_latest("span", places, lambda: _span(inputs))
        counts = [len(each.values) for each in spectral.vectors(inputs)]
        core = (core_left * (values * np.repeat(weights, counts))) @ core_right.T
        u, sigma, v = spectral.svd(core)
        product = Product(left @ (u * (change(sigma) - sigma)), v @ right.T) if len(sigma) else None
    added = [spectral.low_rank(inputs.origin, product)] if product else []
    return weighted_sum([*models, *added], [*weights, *(1.0 for _ in added)], inputs.origin, inputs.dtype)


def _span(inputs: TensorGroup) -> Arrays:
    """Return bases of the models' outputs and inputs, the singular vectors in them, and the singular values."""
    found = spectral.vectors(inputs)
    left, core_left = np.linalg.qr(np.concatenate([each.left for each in found], axis=1, dtype=np.float64))
    right, core_right = np.linalg.qr(np.concatenate([each.right for each in found], dtype=np.float64).T)
    return Arrays((left, right, core_left, core_right, np.concatenate([each.values for each in found])))
