"""Task arithmetic: add weighted task vectors to the base (https://arxiv.org/abs/2212.04089, section 2)."""

from torch import Tensor

from llmevo.merging.kernels.task_vectors import weighted_sum
from llmevo.merging.methods.base import TensorGroup, coefficients


def task_arithmetic(inputs: TensorGroup) -> Tensor:
    """Return base + λ Σ wᵢδᵢ, the sum divided by Σ wᵢ with `normalize`."""
    return weighted_sum(inputs.models, coefficients(inputs.each, inputs.shared), inputs.origin, inputs.dtype)
