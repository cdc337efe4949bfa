"""TIES: trim, elect signs, merge the agreeing entries (https://arxiv.org/abs/2306.01708, Algorithm 1)."""

from torch import Tensor

from llmevo.merging.kernels.blocks import Operand
from llmevo.merging.kernels.task_vectors import NOTHING, Mask, bound, merge_sparse, window
from llmevo.merging.methods.base import TensorGroup


def trim(inputs: TensorGroup, model: int, operand: Operand) -> Mask | None:
    """Keep the `density` share of the entries that is largest in magnitude; at least one where density is over 0."""
    density = inputs.each["density"][model]
    if density >= 1.0:
        return None
    size = inputs.origin.numel()
    if density <= 0.0 or not size:
        return NOTHING
    return window(bound(inputs, model, operand, max(1, int(density * size))))


def ties(inputs: TensorGroup) -> Tensor:
    """Return base + λ · elected sum of the trimmed, weighted task vectors."""
    return merge_sparse(inputs, trim, elected=True)
