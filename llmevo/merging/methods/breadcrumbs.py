"""Model Breadcrumbs: leave out the largest and the smallest entries (https://arxiv.org/abs/2312.06795, section 3).

Two methods: `breadcrumbs` adds up what is left, `breadcrumbs_ties` elects signs first.
"""

from torch import Tensor

from llmevo.merging.kernels.blocks import Operand
from llmevo.merging.kernels.task_vectors import NOTHING, Mask, bound, merge_sparse, window
from llmevo.merging.methods.base import TensorGroup


def leave_middle(inputs: TensorGroup, model: int, operand: Operand) -> Mask | None:
    """Leave out the `gamma` largest, then the smallest until the share `density` is left.

    Fewer of the largest are left out where both together would leave less than `density`, as in mergekit.
    """
    density, gamma = inputs.each["density"][model], inputs.each["gamma"][model]
    if density >= 1.0:
        return None
    size = inputs.origin.numel()
    wanted = int(density * size)
    if wanted <= 0:
        return NOTHING
    smallest = max(0, size - wanted - int(gamma * size))
    lower = bound(inputs, model, operand, size - smallest, "lower")
    return window(lower, bound(inputs, model, operand, size - smallest - wanted, "upper"))


def breadcrumbs(inputs: TensorGroup) -> Tensor:
    """Return base + λ · Σ wᵢ · middle of task vector i."""
    return merge_sparse(inputs, leave_middle, elected=False)


def breadcrumbs_ties(inputs: TensorGroup) -> Tensor:
    """Return base + λ · elected sum of the middles of the weighted task vectors."""
    return merge_sparse(inputs, leave_middle, elected=True)
