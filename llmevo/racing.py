"""Racing: a candidate is asked a block of questions at a time, and no more once it cannot be among those that matter.

The test is paired: the candidate against a rival on the very same questions, so that what they have in common (hard and
easy questions) does not blur the difference. What is tested is where the candidate would stand on all the questions,
so the error falls to nothing as they are used up (the correction for a finite population; Cochran, Sampling Techniques,
1977, chapter 2). Looking several times is paid for by Pocock's constant bound (1977,
https://doi.org/10.1093/biomet/64.2.191): of the candidates that are no worse than the rival, at most the stated share
is stopped, all looks together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy  # its parts are opened when they are used

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
    """Its standard error, stratified by task."""
    items: int

    @property
    def t(self) -> float:
        """The mean in standard errors."""
        return self.mean / self.error if self.error else math.copysign(math.inf, self.mean) if self.mean else 0.0


def difference(
    own: ItemScores, rival: ItemScores, weights: Mapping[str, float], in_general: bool = False
) -> Difference:
    """The paired difference; of the rival's questions, the first as many as the candidate was asked.

    Its error is that of an estimate for all the rival's questions, or, `in_general`, for all questions of their kind.
    The variance of a question's difference is pooled over the tasks, and one unlike answer is added to them: a few
    equal answers are no certainty.
    """
    gaps = {
        task: np.asarray(own[task], dtype=float) - np.asarray(rival[task][: len(own[task])], dtype=float)
        for task in weights
    }
    items = sum(map(len, gaps.values()))
    squares = sum(float(((gap - gap.mean()) ** 2).sum()) for gap in gaps.values())
    spread = (squares + 1.0) / max(1, items - len(gaps))
    mean = sum(weight * float(gaps[task].mean()) for task, weight in weights.items())
    variance = sum(
        weight**2 * spread / len(gaps[task]) * (1.0 if in_general else 1 - len(gaps[task]) / len(rival[task]))
        for task, weight in weights.items()
    )
    return Difference(mean, math.sqrt(variance), items)


def beaten(gap: Difference, look: int, looks: int, error_rate: float) -> bool:
    """Whether a candidate can be stopped at this look (from 1) of so many: it is worse than its rival, but for
    `error_rate`.
    """
    if look >= looks or gap.items < FEWEST:
        return False
    bound = scipy.stats.t.ppf(scipy.stats.norm.cdf(pocock(looks - 1, error_rate)), gap.items - 1)
    return bool(gap.t < -bound)


@cache
def pocock(looks: int, error_rate: float) -> float:
    """The bound on z that a random walk crosses at any of so many equidistant looks with probability `error_rate`."""
    if looks == 1:
        return float(scipy.stats.norm.ppf(1 - error_rate))
    steps = np.arange(1.0, looks + 1)
    correlation: Any = np.sqrt(np.minimum.outer(steps, steps) / np.maximum.outer(steps, steps))
    walk: Any = scipy.stats.multivariate_normal(np.zeros(looks), correlation, seed=0)
    low, high = float(scipy.stats.norm.ppf(1 - error_rate)), float(scipy.stats.norm.ppf(1 - error_rate / looks))
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if walk.cdf(np.full(looks, middle)) < 1 - error_rate else (low, middle)
    return high
