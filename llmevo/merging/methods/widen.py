"""Static widening: one MLP with the neurons of several, which computes their weighted sum exactly: a mixture of experts
(https://arxiv.org/abs/1701.06538, eq. 1) whose gate does not depend on the input."""

from dataclasses import replace

from torch import Tensor

from llmevo.merging.methods.base import TensorGroup
from llmevo.merging.methods.linear import linear


def widen(inputs: TensorGroup) -> Tensor:
    """Return the weighted mean of the models, for tensors outside of MLPs: Σ wᵢxᵢ / Σ wᵢ.

    In an MLP, D(act(Gx) ⊙ Ux), the rows of G and U of all models are stacked, and the columns of their D stand next to
    each other, each D times pᵢ = scale · wᵢ / Σ wᵢ. So the MLP has the neurons of all models, and its output is
    Σ pᵢ · MLPᵢ(x), exactly.
    """
    return linear(replace(inputs, shared={"normalize": True}))
