"""Task arithmetic: add weighted task vectors to the base (https://arxiv.org/abs/2212.04089, section 2)."""

from torch import Tensor

from llmevo.merging.kernels.task_vectors import weighted_sum
from llmevo.merging.methods.base import TensorGroup, divisor


def task_arithmetic(inputs: TensorGroup) -> Tensor:
    """Return base + λ Σ wᵢδᵢ, the sum divided by Σ wᵢ with `normalize`."""
    weights = inputs.each["weight"]
    scale = inputs.shared["lambda"] / (divisor(weights) if inputs.shared["normalize"] else 1.0)
    return weighted_sum(inputs.models, [weight * scale for weight in weights], inputs.origin, inputs.dtype)
