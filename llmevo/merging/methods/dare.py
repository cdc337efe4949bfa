"""DARE: drop entries of the task vectors at random and rescale the rest (https://arxiv.org/abs/2311.03099, section 3).

Two methods: `dare_linear` sums the rest, `dare_ties` elects signs first.
"""

from torch import Tensor

from llmevo.merging.kernels.blocks import Operand
from llmevo.merging.kernels.task_vectors import NOTHING, Mask, merge_sparse, random_mask
from llmevo.merging.methods.base import TensorGroup


def drop(inputs: TensorGroup, model: int, _operand: Operand) -> Mask | None:
    """Keep each entry with probability `density`.

    The paper multiplies the kept entries by 1/density (`inverse_density`); by default the L1 norm is matched, as in
    mergekit, which is the same on average.
    """
    density = inputs.each["density"][model]
    if density >= 1.0:
        return None
    if density <= 0.0:
        return NOTHING
    inverse = bool(inputs.shared["rescale"]) and bool(inputs.shared["inverse_density"])
    return random_mask(inputs.seeds[model], density, inverse)


def dare_linear(inputs: TensorGroup) -> Tensor:
    """Return base + λ · Σ wᵢ · dropped, rescaled task vector i."""
    return merge_sparse(inputs, drop, elected=False)


def dare_ties(inputs: TensorGroup) -> Tensor:
    """Return base + λ · elected sum of the dropped, rescaled, weighted task vectors."""
    return merge_sparse(inputs, drop, elected=True)
