"""TIES: trim, elect signs, merge the agreeing entries (https://arxiv.org/abs/2306.01708)."""

from torch import Tensor

from llmevo.methods.base import Inputs, Method, Parameter, dense
from llmevo.methods.consensus import elect


def trim(delta: Tensor, density: float) -> Tensor:
    """Keep the `density` share of the entries that is largest in magnitude, zero the others.

    At least one entry is kept: mergekit stops with an assertion where density · size rounds to 0.
    """
    if density >= 1.0:
        return delta
    magnitudes = delta.abs().flatten()
    kept = max(1, int(density * magnitudes.numel()))
    # Selecting the cut-off takes one pass where sorting takes many; of equal entries the first ones are kept.
    cutoff = magnitudes.kthvalue(magnitudes.numel() - kept + 1).values
    mask = magnitudes > cutoff
    mask[(magnitudes == cutoff).nonzero()[: kept - int(mask.sum())]] = True
    return delta * mask.view_as(delta)


def ties(inputs: Inputs) -> Tensor:
    """base + λ · elected sum of the trimmed, weighted task vectors."""
    assert inputs.base is not None
    trimmed = [
        trim(dense(delta), density) for delta, density in zip(inputs.tensors, inputs.each["density"], strict=True)
    ]
    mixed = elect(trimmed, inputs.each["weight"], bool(inputs.shared["normalize"]))
    return inputs.base + mixed.mul_(inputs.shared["lambda"])


TIES = Method(
    name="ties",
    merge=ties,
    paper="https://arxiv.org/abs/2306.01708",
    each={
        "weight": Parameter(default=None, low=0.0, high=1.5),
        "density": Parameter(default=1.0, low=0.01, high=1.0),
    },
    shared={"normalize": Parameter(default=True), "lambda": Parameter(default=1.0)},
    takes_base=True,
    normalize=True,
)
