"""The best search score without the luck of being chosen (the winner's curse): bootstrap bias correction.

Tsamardinos et al. 2018, https://doi.org/10.1007/s10994-018-5714-4. Questions are drawn with replacement, the candidate
that is best on them is chosen, and its score on the questions not drawn is averaged over the draws. All candidates
answer the same questions, so their errors are correlated; the bootstrap keeps that, where a normal model with
independent errors (shrinkage) overstates the luck. The estimate is slightly too low, as fewer questions choose.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST = 6
"""Candidates below which the estimate is not made."""

RESAMPLES = 1000


@dataclass(frozen=True)
class Corrected:
    """The highest score, and what the same choice gives on new questions."""

    score: float
    """As it was measured."""
    mean: float
    low: float
    """Of the 95 % interval."""
    high: float

    @property
    def luck(self) -> float:
        return self.score - self.mean


def bootstrap_corrected(
    items: Sequence[Sequence[Sequence[float]]], weights: Sequence[float], seed: int = 0
) -> Corrected | None:
    """Return the corrected highest score; None with under six candidates.

    `items[candidate][task]` are the scores of a task's questions; `weights` are those of the tasks.
    """
    if len(items) < FEWEST:
        return None
    tables = [np.array([candidate[task] for candidate in items], dtype=np.float64) for task in range(len(weights))]
    random = np.random.default_rng(seed)
    chosen_by, judged_by = np.zeros((RESAMPLES, len(items))), np.zeros((RESAMPLES, len(items)))
    for table, weight in zip(tables, weights, strict=True):
        count = table.shape[1]
        drawn = random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        left = np.where((drawn == 0).any(1)[:, None], drawn == 0, 1.0)
        chosen_by += weight * (drawn @ table.T) / count
        judged_by += weight * (left @ table.T) / left.sum(1)[:, None]
    found = judged_by[np.arange(RESAMPLES), chosen_by.argmax(1)]
    best = max(sum(weight * table.mean(1) for table, weight in zip(tables, weights, strict=True)))
    low, high = np.quantile(found, [0.025, 0.975])
    return Corrected(float(best), float(found.mean()), float(low), float(high))
