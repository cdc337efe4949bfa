"""TSV-M: task vectors whose singular vectors are orthogonal to those of the others
(https://arxiv.org/abs/2412.00081, section 4.3)."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from llmevo.merging.kernels import spectral
from llmevo.merging.kernels.spectral import Product
from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.methods.task_arithmetic import task_arithmetic


def tsv(inputs: TensorGroup) -> Tensor:
    """Return base + λ Σ wᵢ·((1 - blend)·δᵢ + blend·U⊥ᵢSᵢV⊥ᵢᵀ), with δᵢ ≈ UᵢSᵢVᵢᵀ by its largest singular values.

    [U⊥₁ … U⊥ₙ] is the matrix with orthonormal columns that is nearest to [U₁ … Uₙ] (equation 8 of the paper), and V⊥
    likewise. `rank` is the share of each task vector's rank that is kept: of an adapter's rank, or of the smaller side
    of a matrix over n. Tensors that are no matrices, and a model that is alone, are merged by task arithmetic, as is
    everything with blend 0.
    """
    blend, rank = inputs.shared["blend"], inputs.shared["rank"]
    if blend == 0.0 or not spectral.is_separable(inputs):
        return task_arithmetic(inputs)
    return spectral.blended(
        inputs, spectral.keep_products(inputs, "tsv", rank, lambda: orthogonal(inputs, rank)), blend
    )


def orthogonal(inputs: TensorGroup, rank: float) -> Sequence[Product]:
    """Return U⊥ᵢSᵢV⊥ᵢᵀ of each used model."""
    found = spectral.vectors(inputs, rank)
    left = spectral.polar(np.concatenate([each.left for each in found], axis=1, dtype=np.float64))
    right = spectral.polar(np.concatenate([each.right for each in found], dtype=np.float64).T)
    ends = np.cumsum([len(each.values) for each in found])[:-1]
    sides = zip(np.split(left, ends, axis=1), np.split(right, ends, axis=1), found, strict=True)
    return [Product(ours * each.values, theirs.T) for ours, theirs, each in sides]
