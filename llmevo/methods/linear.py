"""Linear: the weighted mean of the models (model soups, https://arxiv.org/abs/2203.05482)."""

from torch import Tensor

from llmevo.methods.base import Inputs, Method, Parameter, divisor, weighted_sum


def linear(inputs: Inputs) -> Tensor:
    """Σ wᵢxᵢ, divided by Σ wᵢ with `normalize`.

    With a base model that is not among the models (it has weight 0 then) the sum is that of the models alone.
    """
    weights = inputs.each["weight"]
    merged = weighted_sum(inputs.tensors, weights)
    return merged.div_(divisor(weights)) if inputs.shared["normalize"] else merged


LINEAR = Method(
    name="linear",
    merge=linear,
    paper="https://arxiv.org/abs/2203.05482",
    each={"weight": Parameter(default=None, low=0.0, high=1.0)},
    shared={"normalize": Parameter(default=True)},
    normalize=True,
)
