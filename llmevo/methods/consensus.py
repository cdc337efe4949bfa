"""Sign election, the second half of TIES and DARE-TIES (https://arxiv.org/abs/2306.01708, section 3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def elect(deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Σ of the weighted deltas that agree with the elected sign.

    The elected sign of an entry is that of Σ wᵢδᵢ, where a sum of 0 counts as positive; an entry that is
    exactly 0 takes no part. With `normalize` each entry is divided by the weights that took part in it
    (1 where they sum to 0), as mergekit does.
    """
    weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
    majority = torch.where(torch.stack(weighted).sum(dim=0) >= 0, 1.0, -1.0)
    mixed = torch.zeros_like(weighted[0])
    shares = torch.zeros_like(weighted[0])
    for delta, weight in zip(weighted, weights, strict=True):
        agrees = delta.sign() == majority
        mixed.add_(delta * agrees)
        if normalize:
            shares.add_(agrees, alpha=weight)
    if normalize:
        # Mixed signs of weights can leave a share close to 0; dividing by it would blow noise up without bound.
        mixed.div_(torch.where(shares.abs() < 1e-8, 1.0, shares))
    return mixed
