"""Linear: the weighted mean of the models (model soups, https://arxiv.org/abs/2203.05482)."""

from torch import Tensor

from llmevo.merging.kernels.task_vectors import weighted_sum
from llmevo.merging.methods.base import TensorGroup, coefficients
from llmevo.models.checkpoints import same


def linear(inputs: TensorGroup) -> Tensor:
    """Return Σ wᵢxᵢ, divided by Σ wᵢ with `normalize`.

    With a base model that is not among the models (it has weight 0 then) the sum is that of the models alone.
    """
    weights = coefficients(inputs.each, inputs.shared)
    first = inputs.models[0]
    alike = isinstance(first, Tensor) and all(isinstance(m, Tensor) and same(m, first) for m in inputs.models)
    if isinstance(first, Tensor) and alike and abs(sum(weights) - 1.0) < 1e-9:
        return first  # nothing to mix, such as the embeddings that adapters of one base leave as they are
    return weighted_sum(inputs.models, weights, None, inputs.dtype)
