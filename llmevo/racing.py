"""Racing: a candidate is asked a block of questions at a time, and no more once it cannot be among those that matter.

The test is paired: the candidate against a rival on the very same questions, so that what they have in common (hard and
easy questions) does not blur the difference. Looking several times is paid for by Pocock's constant bound (Pocock 1977,
https://doi.org/10.1093/biomet/64.2.191): under "no worse than the rival" a candidate is stopped with at most the stated
probability, all looks together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy.stats import multivariate_normal, norm, t

ItemScores = Mapping[str, Sequence[float]]
"""{task: the counted metric of every question}."""

FEWEST = 16
"""Questions before the first look: a t-test on fewer says little."""


@dataclass(frozen=True)
class Difference:
    """How a candidate stands to a rival on the questions that both were asked."""

    mean: float
    """Of the objective: Σ weight · metric. Below 0 the candidate is worse."""
    error: float
    """Its standard error; stratified by task."""
    items: int

    @property
    def t(self) -> float:
        """The mean in standard errors."""
        return self.mean / self.error if self.error else math.copysign(math.inf, self.mean) if self.mean else 0.0


def difference(own: ItemScores, rival: ItemScores, weights: Mapping[str, float]) -> Difference:
    """The paired difference; of the rival's questions, the first as many as the candidate was asked."""
    mean, variance, items = 0.0, 0.0, 0
    for task, weight in weights.items():
        gaps = np.asarray(own[task], dtype=float) - np.asarray(rival[task][: len(own[task])], dtype=float)
        count = len(gaps)
        mean += weight * float(gaps.mean())
        # One more agreement and one more disagreement of either sign: a few equal answers are no certainty.
        spread = (float(((gaps - gaps.mean()) ** 2).sum()) + 1.0) / count
        variance += weight**2 * spread / count
        items += count
    return Difference(mean, math.sqrt(variance), items)


def beaten(gap: Difference, look: int, looks: int, error_rate: float) -> bool:
    """Whether a candidate can be stopped at this look (from 1) of so many: it is worse than its rival, but for
    `error_rate`.
    """
    if look >= looks or gap.items < FEWEST:
        return False
    bound = t.ppf(norm.cdf(pocock(looks - 1, error_rate)), gap.items - 1)
    return bool(gap.t < -bound)


@cache
def pocock(looks: int, error_rate: float) -> float:
    """The bound on z that a random walk crosses at any of so many equidistant looks with probability `error_rate`."""
    if looks == 1:
        return float(norm.ppf(1 - error_rate))
    steps = np.arange(1.0, looks + 1)
    correlation: Any = np.sqrt(np.minimum.outer(steps, steps) / np.maximum.outer(steps, steps))
    walk: Any = multivariate_normal(np.zeros(looks), correlation, seed=0)
    low, high = float(norm.ppf(1 - error_rate)), float(norm.ppf(1 - error_rate / looks))
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if walk.cdf(np.full(looks, middle)) < 1 - error_rate else (low, middle)
    return high
