"""WUDI in closed form, with a ridge: task vectors that disturb one another least on the inputs that they stand for.

WUDI (https://arxiv.org/abs/2503.08099, equation 9) minimizes Σᵢ ‖(Δ - δᵢ)δᵢᵀ‖²/‖δᵢ‖² over Δ by gradient steps from the
sum of the task vectors. The objective is quadratic; its minimizer with a ridge λ towards the sum is
Δ = Σᵢ Dᵢ with Dᵢ = δᵢ(Gᵢ + λI)(ΣⱼGⱼ + λI)⁻¹ and Gᵢ = δᵢᵀδᵢ/‖δᵢ‖². It is linear in the task vectors, so each is replaced
once by its own Dᵢ.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from llmevo.merging.kernels import spectral
from llmevo.merging.kernels.spectral import Product
from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.methods.task_arithmetic import task_arithmetic

LEAST_RIDGE, MOST_RIDGE = 1e-6, 1e12
"""The ridge, relative to the mean eigenvalue of ΣGᵢ, with blend 1, and next to blend 0: none at all makes the inverse
noise, and an endless one is no number."""


def wudi(inputs: TensorGroup) -> Tensor:
    """Return base + λ Σ wᵢ·Dᵢ, with the ridge (1 - blend)/blend times the mean eigenvalue of ΣᵢGᵢ.

    Exact for LoRA adapters; of a full fine-tune the largest directions are changed (see `spectral.vectors`) and the
    rest stays. Blend 0 is an infinite ridge, task arithmetic; so are tensors that are no matrices and a model alone.
    """
    blend = inputs.shared["blend"]
    if blend == 0.0 or not spectral.is_separable(inputs):
        return task_arithmetic(inputs)
    products = spectral.keep_products(inputs, "wudi", blend, lambda: changes(inputs, blend))
    return spectral.blended(inputs, products, instead=False)


def changes(inputs: TensorGroup, blend: float) -> Sequence[Product]:
    """Return Dᵢ - δᵢ of each used model, in a basis of all their inputs."""
    found = spectral.vectors(inputs)
    basis, triangle = np.linalg.qr(np.concatenate([each.right for each in found], dtype=np.float64).T)
    coordinates = np.split(triangle.T, np.cumsum([len(each.values) for each in found])[:-1])
    rows = [each.values[:, None] * place for each, place in zip(found, coordinates, strict=True)]
    grams = [row.T @ row / max(float(np.square(row).sum()), np.finfo(np.float64).tiny) for row in rows]
    total = np.sum(grams, axis=0)
    mean = max(float(np.trace(total)) / max(len(total), 1), 1e-30)
    ridge = min(max((1.0 - blend) / blend, LEAST_RIDGE), MOST_RIDGE) * mean
    unit = np.eye(len(total))
    changed = [np.linalg.solve(total + ridge * unit, gram + ridge * unit).T - unit for gram in grams]
    # (G + λI)(ΣG + λI)⁻¹ is the transpose of (ΣG + λI)⁻¹(G + λI), as all of them are symmetric.
    return [
        Product(each.left.astype(np.float64), row @ change @ basis.T)
        for each, row, change in zip(found, rows, changed, strict=True)
    ]
