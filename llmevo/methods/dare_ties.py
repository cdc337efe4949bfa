"""DARE-TIES: drop at random, rescale, elect signs (https://arxiv.org/abs/2311.03099, section 3)."""

import torch
from torch import Tensor

from llmevo.methods.base import Inputs, Method, Parameter, dense
from llmevo.methods.consensus import elect


def drop(delta: Tensor, density: float, rescale: bool, generator: torch.Generator) -> Tensor:
    """Keep each entry with probability `density`; with `rescale` match the L1 norm from before the drop.

    The paper multiplies by 1/density; mergekit matches the norm, which is the same on average and is what
    this follows. Where so little is left that the ratio means nothing (norms under 1e-7) nothing is scaled.
    """
    if density >= 1.0:
        return delta
    mask = torch.rand(delta.shape, generator=generator) < density
    kept = delta * mask.to(delta.device)
    if not rescale:
        return kept
    before, after = delta.abs().sum(), kept.abs().sum()
    return kept if min(before, after) < 1e-7 else kept.mul_(before / after)


def dare_ties(inputs: Inputs) -> Tensor:
    """base + λ · elected sum of the randomly dropped, rescaled, weighted task vectors."""
    assert inputs.base is not None
    dropped = [
        drop(dense(delta), density, bool(inputs.shared["rescale"]), inputs.generator(place))
        for place, (delta, density) in enumerate(zip(inputs.tensors, inputs.each["density"], strict=True))
    ]
    mixed = elect(dropped, inputs.each["weight"], bool(inputs.shared["normalize"]))
    return inputs.base + mixed.mul_(inputs.shared["lambda"])


DARE_TIES = Method(
    name="dare_ties",
    merge=dare_ties,
    paper="https://arxiv.org/abs/2311.03099",
    each={
        "weight": Parameter(default=None, low=0.0, high=1.5),
        "density": Parameter(default=1.0, low=0.01, high=1.0),
    },
    shared={
        "normalize": Parameter(default=False),
        "rescale": Parameter(default=True),
        "lambda": Parameter(default=1.0),
    },
    takes_base=True,
    normalize=True,
)
