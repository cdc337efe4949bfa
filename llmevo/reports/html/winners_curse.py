"""What the best search score is worth: the highest of many noisy scores is high by luck too (the winner's curse).

A posterior does not care how a candidate was chosen, so shrinking the score towards the others corrects it (Efron 2011,
https://doi.org/10.1198/jasa.2011.tm11181). The true scores are taken for normal around an unknown mean with an unknown
spread, each seen with its own standard error, and both unknowns are averaged over, not fixed (Morris 1983,
https://doi.org/10.1080/01621459.1983.10477920; Gelman et al., Bayesian Data Analysis, section 5.4).
Question by question, choosing again on resampled questions and scoring on those left out says the same without any
such assumption (Tsamardinos et al. 2018, https://doi.org/10.1007/s10994-018-5714-4).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FEWEST = 6
"""Scores below which nothing can be said of their spread."""


LEVEL = 0.95


GRID = 400
"""Spreads and scores at which the posterior is summed up."""


RESAMPLES = 1000


Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Corrected:
    """The best candidate's score without the luck of being chosen."""

    score: float
    """As it was measured."""
    mean: float
    low: float
    """Of the 95 % interval."""
    high: float
    count: int
    """Scores that it was learnt from."""
    centre: float
    """What it was shrunk towards."""

    @property
    def luck(self) -> float:
        return self.score - self.mean


def shrink(scores: Sequence[float], stderrs: Sequence[float], place: int) -> Corrected | None:
    """The posterior of the true score at `place`; None with under six scores, or without standard errors.

    A standard error of 0, as lm-eval reports where all answers are right, is taken for the mean of the others.
    """
    values, errors = np.array(scores, dtype=np.float64), np.array(stderrs, dtype=np.float64)
    if len(values) < FEWEST or not (errors > 0).any():
        return None
    errors = np.where(errors > 0, errors, errors[errors > 0].mean())
    # Flat in the spread from nothing to far beyond what was seen.
    spreads = np.linspace(1e-3, 1.0, GRID) * 3 * max(float(values.std()), float(errors.mean()))
    variances = spreads[:, None] ** 2 + errors**2
    precision = (1 / variances).sum(1)
    centres = (values / variances).sum(1) / precision
    logs = -0.5 * (np.log(precision) + np.log(variances).sum(1) + ((values - centres[:, None]) ** 2 / variances).sum(1))
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    share = errors[place] ** 2 / variances[:, place]  # how far the score is moved to the centre
    means = share * centres + (1 - share) * values[place]
    deviations = np.sqrt((1 - share) * errors[place] ** 2 + share**2 / precision)
    low, high = _quantiles(weights, means, deviations)
    mean, centre = float(weights @ means), float(weights @ centres)
    return Corrected(float(values[place]), mean, low, high, len(values), centre)


def _quantiles(weights: Floats, means: Floats, deviations: Floats) -> tuple[float, float]:
    """The ends of the 95 % interval of a mixture of normal distributions."""
    grid = np.linspace((means - 4 * deviations).min(), (means + 4 * deviations).max(), GRID)
    below: Any = stats.norm.cdf(grid[:, None], means, deviations) @ weights
    low, high = np.interp([(1 - LEVEL) / 2, (1 + LEVEL) / 2], below, grid)
    return float(low), float(high)


def rechoose(items: Sequence[Sequence[Sequence[float]]], weights: Sequence[float], seed: int = 0) -> Corrected | None:
    """The expected score of a candidate chosen as this one was; None with under six candidates.

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
    totals = sum(weight * table.mean(1) for table, weight in zip(tables, weights, strict=True))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    best = float(np.max(totals))
    return Corrected(best, float(found.mean()), float(low), float(high), len(items), float(np.mean(totals)))
