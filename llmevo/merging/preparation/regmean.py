"""RegMean: experts whose sum answers, on the inputs of each expert, as that expert does, in the least squares
(https://arxiv.org/abs/2212.09849, equation 2), and RegMean++ (https://arxiv.org/abs/2508.03121).

With Gᵢ = E[xxᵀ] of expert i, the merge is (ΣWᵢGᵢ)(ΣGᵢ)⁻¹ = W₀ + Σ δᵢGᵢ(ΣGⱼ)⁻¹: linear in the task vectors, so each is
replaced once, and the weights of a merge stay free. With all of them 1 the merge is RegMean.

RegMean++ is the same with other inputs: those of a layer of expert i where the layers below are the merge with weights
1, as they are in the merged model (`llmevo.run.calibration.sequential` measures them).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from llmevo.merging.kernels.spectral import Matrix, one_thread
from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.preparation.weights import is_adapted, of_factors
from llmevo.models.checkpoints import LowRank, Weight

LEAST_RIDGE = 1e-6
"""The ridge with blend 1, relative to the mean eigenvalue: channels that no text reaches make ΣGᵢ singular."""


def regmean(inputs: TensorGroup, parameters: Mapping[str, float], measured: Sequence[Tensor]) -> Sequence[Weight]:
    """Return each expert with the task vector Dᵢ = δᵢ(Gᵢ + λI)(ΣⱼGⱼ + λI)⁻¹, λ being (1 - blend)/blend times the mean
    eigenvalue of ΣGⱼ.

    Blend 0 leaves the task vectors as they are; blend 1 is RegMean. `alpha` is the factor of the entries of G off its
    diagonal, as in the paper.
    """
    blend = parameters["blend"]
    if blend == 0.0:
        return inputs.models
    with one_thread():
        grams = [_shrunk(gram.double().numpy(), parameters["alpha"]) for gram in measured]
        total = np.sum(grams, axis=0)
        mean = float(np.trace(total)) / len(total)
        ridge = max((1.0 - blend) / blend, LEAST_RIDGE) * max(mean, 1e-30) * np.eye(len(total))
        # δ(G + λI)(ΣG + λI)⁻¹ is the transpose of (ΣG + λI)⁻¹(G + λI)δᵀ; of an adapter the rows of its second factor.
        rows = [_rows(inputs, place) for place in range(len(grams))]
        right = [(gram + ridge) @ own.T for gram, own in zip(grams, rows, strict=True)]
        solved = np.linalg.solve(total + ridge, np.concatenate(right, axis=1)).T
    ends = np.cumsum([len(own) for own in rows])[:-1]
    return [_changed(inputs, place, own) for place, own in enumerate(np.split(solved, ends))]


def regmean_plusplus(
    inputs: TensorGroup, parameters: Mapping[str, float], measured: Sequence[Tensor]
) -> Sequence[Weight]:
    """Return each expert with the task vector Dᵢ of `regmean`, Gᵢ being of inputs above merged layers."""
    return regmean(inputs, parameters, measured)


def _shrunk(gram: Matrix, alpha: float) -> Matrix:
    return gram * alpha + np.diag(np.diag(gram)) * (1.0 - alpha)


def _rows(inputs: TensorGroup, place: int) -> Matrix:
    weight = inputs.models[place]
    if isinstance(weight, LowRank) and is_adapted(inputs, place):
        return weight.down.double().numpy()
    return inputs.delta(place).double().numpy()


def _changed(inputs: TensorGroup, place: int, rows: Matrix) -> Weight:
    weight, new = inputs.models[place], torch.from_numpy(np.ascontiguousarray(rows, np.float32))
    if isinstance(weight, LowRank) and is_adapted(inputs, place):
        return of_factors(inputs, weight.up, new)
    return inputs.origin.float() + new
