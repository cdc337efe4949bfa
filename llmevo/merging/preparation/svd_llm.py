"""Activation-aware SVD: task vectors of a lower rank, with the least error on the inputs that the expert meets
(SVD-LLM, https://arxiv.org/abs/2403.07378, section 3.1, there for whole weights).

With G = E[xxᵀ] = LLᵀ, the expected squared error E‖(δ - D)x‖² is ‖(δ - D)L‖². Of all D of rank k, the least has
δL = UΣVᵀ cut after k values, so D = UₖΣₖVₖᵀL⁻¹ = UₖUₖᵀδ: no inverse is needed.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from llmevo.merging.kernels import spectral
from llmevo.merging.kernels.spectral import Matrix
from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.preparation.weights import is_adapted, of_factors
from llmevo.models.checkpoints import LowRank, Weight, same


def svd_llm(inputs: TensorGroup, parameters: Mapping[str, float], measured: Sequence[Tensor]) -> Sequence[Weight]:
    """Return each expert with the task vector UₖUₖᵀδᵢ, Uₖ being the first k left singular vectors of δᵢLᵢ.

    Gᵢ = LᵢLᵢᵀ is E[xxᵀ] of the expert's inputs. k is the share `rank` of its own rank, at least 1: of an adapter's, or
    of the smaller side of a matrix. Rank 1 leaves the experts as they are.
    """
    share = parameters["rank"]
    if share >= 1.0:
        return inputs.models
    with spectral.one_thread():
        return [_reduced(inputs, place, gram, share) for place, gram in enumerate(measured)]


def _reduced(inputs: TensorGroup, place: int, gram: Tensor, share: float) -> Weight:
    weight = inputs.models[place]
    if isinstance(weight, Tensor) and same(weight, inputs.origin):
        return weight
    if isinstance(weight, LowRank) and is_adapted(inputs, place):
        # The left singular vectors of up·down·L are those of (R·down·L), turned by Q, where up = QR.
        left, upper = np.linalg.qr(weight.up.double().numpy())
        inner = upper @ weight.down.double().numpy()
        kept = _first(inner @ _root(gram), len(inner), share)
        return of_factors(inputs, _rounded(left @ kept), _rounded(kept.T @ inner))
    delta = inputs.delta(place).double().numpy()
    kept = _first(delta @ _root(gram), min(delta.shape), share)
    return inputs.origin.float() + _rounded(kept @ (kept.T @ delta))


def _root(gram: Tensor) -> Matrix:
    """Return L with LLᵀ = G.

    By eigenvalues, because G is often singular, and no Cholesky decomposition takes the small negative ones that
    rounding gives it then.
    """
    values, vectors = np.linalg.eigh(gram.double().numpy())
    return vectors * np.sqrt(np.maximum(values, 0.0))


def _first(matrix: Matrix, own: int, share: float) -> Matrix:
    """Return the first left singular vectors, `share` of `own`, in float64."""
    found = spectral.of_matrix(torch.from_numpy(matrix.astype(np.float32)), max(1, round(share * own)))
    return np.linalg.qr(found.left.astype(np.float64))[0]


def _rounded(matrix: Matrix) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(matrix, np.float32))
