"""STAR: task vectors without their small singular values, scaled to the nuclear norm that they had
(https://arxiv.org/abs/2502.10339, section 3)."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from llmevo.merging.kernels import spectral
from llmevo.merging.kernels.spectral import Product
from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.methods.task_arithmetic import task_arithmetic


def star(inputs: TensorGroup) -> Tensor:
    """Return base + λ Σ wᵢ·UᵢS'ᵢVᵢᵀ, where S'ᵢ has the largest singular values that hold the share `eta` of their sum.

    They are scaled so that their sum, the nuclear norm, is what it was. Directions of a full fine-tune beyond its own
    rank (see `spectral.vectors`) stay as they are. With eta 1, and for a model that is alone, this is task arithmetic.
    """
    eta = inputs.shared["eta"]
    if eta >= 1.0 or not spectral.is_separable(inputs):
        return task_arithmetic(inputs)
    products = spectral.keep_products(inputs, "star", eta, lambda: changes(inputs, eta))
    return spectral.blended(inputs, products, instead=False)


def changes(inputs: TensorGroup, eta: float) -> Sequence[Product]:
    found: list[Product] = []
    for each in spectral.vectors(inputs):
        sums = np.cumsum(each.values)
        kept = int(np.searchsorted(sums, eta * sums[-1])) + 1 if len(sums) else 0
        values = np.where(np.arange(len(sums)) < kept, each.values * (sums[-1] / sums[kept - 1] if kept else 1.0), 0.0)
        found.append(Product(each.left * (values - each.values), each.right.astype(np.float64)))
    return found
