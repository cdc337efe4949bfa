"""TIES: trim, elect signs, merge the agreeing entries (https://arxiv.org/abs/2306.01708)."""

import torch
from torch import Tensor

from llmevo.methods.base import Inputs, Method, Parameter
from llmevo.methods.consensus import elect


def trim(delta: Tensor, density: float) -> Tensor:
    """Keep the `density` share of the entries that is largest in magnitude, zero the others.

    At least one entry is kept: mergekit stops with an assertion where density · size rounds to 0.
    """
    if density >= 1.0:
        return delta
    magnitudes = delta.abs().flatten()
    kept = max(1, int(density * magnitudes.numel()))
    mask = torch.zeros_like(magnitudes, dtype=torch.bool)
    mask[torch.topk(magnitudes, kept, sorted=False).indices] = True
    return delta * mask.view_as(delta)


def ties(inputs: Inputs) -> Tensor:
    """base + λ · elected sum of the trimmed, weighted task vectors."""
    assert inputs.base is not None
    trimmed = [trim(delta, density) for delta, density in zip(inputs.tensors, inputs.each["density"], strict=True)]
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
