"""Racing: a candidate is asked a part of the questions at a time, and no more once it cannot get ahead of the best.

What is tested is how far ahead it would be on all the questions, so the error falls to nothing as they are used up. It
is estimated from the paired differences to the best on the questions that both were asked, and from how the others
that were asked everything answered the rest: merges of the same models get much the same questions right (the
regression estimator of a finite population; Cochran, Sampling Techniques, 1977, chapter 7).

Looking several times is paid for by one bound, in standard errors, for all looks (Pocock 1977,
https://doi.org/10.1093/biomet/64.2.191), here for a random walk whose end is given: a Brownian bridge. So of the
candidates that would in the end be ahead by an answer or more, at most the stated share is stopped, all looks together,
as far as the questions come in no order that matters and sums of differences are nearly normal.
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

PREDICTORS = 4
"""So many of the best, beside the mean of all, foresee what a candidate answers."""

NODES: Any = np.polynomial.legendre.leggauss(200)
SPAN = 10.0
"""What is integrated over: from a bound down, in standard deviations."""

RIDGE = 4.0
"""How strongly their coefficients are drawn to 0, in questions on which they are unlike each other."""


@dataclass(frozen=True)
class Difference:
    """How a candidate stands to a rival."""

    mean: float
    """Of the objective: Σ weight · metric. Below 0 the candidate is worse."""
    error: float
    """Its standard error, stratified by task."""
    freedom: float
    """The degrees of freedom of the error."""


def difference(own: ItemScores, rival: ItemScores, weights: Mapping[str, float]) -> Difference:
    """The paired difference on the questions that both were asked, the rival's first ones, as an estimate for all
    questions of their kind.

    The variance of a question's difference is pooled over the tasks, and one unlike answer is added to them: a few
    equal answers are no certainty.
    """
    gaps = _gaps(own, rival, weights)
    freedom = max(1, sum(map(len, gaps.values())) - len(gaps))
    spread = (sum(float((_centred(gap) ** 2).sum()) for gap in gaps.values()) + 1.0) / freedom
    variance = sum(weight**2 * spread / len(gaps[task]) for task, weight in weights.items())
    return Difference(_weighted(gaps, weights), math.sqrt(variance), freedom)


def foreseen(own: ItemScores, field: Sequence[ItemScores], weights: Mapping[str, float]) -> Difference:
    """Where a candidate would stand to the first of the field on all questions. The field, the best first, was asked
    them all; the candidate the first ones of each task.
    """
    gaps = _gaps(own, field[0], weights)
    answers = {task: np.array([one[task] for one in field], dtype=float) for task in weights}
    answers = {task: np.vstack([rows[:PREDICTORS], rows.mean(axis=0)]) for task, rows in answers.items()}
    gap = np.hstack([_centred(gaps[task]) for task in weights])
    known = np.hstack([_centred(answers[task][:, : len(gaps[task])]) for task in weights])
    # How the questions asked differ from all of them, by what the field answered.
    shift = sum(w * (answers[t].mean(axis=1) - answers[t][:, : len(gaps[t])].mean(axis=1)) for t, w in weights.items())
    inner = known @ known.T
    shrunk = inner + RIDGE * np.eye(len(inner))
    slopes = np.linalg.solve(shrunk, known @ gap)
    freedom = max(1.0, len(gap) - len(gaps) - float(np.trace(np.linalg.solve(shrunk, inner))))
    spread = (float(((gap - slopes @ known) ** 2).sum()) + 1.0) / freedom  # one unlike answer, as above
    of_mean = sum(w**2 / len(gaps[t]) * (1 - len(gaps[t]) / answers[t].shape[1]) for t, w in weights.items())
    variance = spread * (of_mean + float(shift @ np.linalg.solve(shrunk, shift)))
    return Difference(_weighted(gaps, weights) + float(slopes @ shift), math.sqrt(variance), freedom)


def beaten(
    own: ItemScores, field: Sequence[ItemScores], weights: Mapping[str, float], look: int, looks: int, error_rate: float
) -> bool:
    """Whether a candidate can be stopped at this look (from 1) of so many: that it would be ahead of the first of the
    field by an answer or more can be ruled out, but for `error_rate`. See `foreseen`.
    """
    if look >= looks or sum(len(own[task]) for task in weights) < FEWEST:
        return False
    gap = foreseen(own, field, weights)
    answer = min((abs(weight) / len(field[0][task]) for task, weight in weights.items() if weight), default=0.0)
    level = scipy.special.ndtr(bound(looks, error_rate))
    return bool(gap.mean - answer < -scipy.special.stdtrit(gap.freedom, level) * gap.error)


@cache
def bound(looks: int, error_rate: float) -> float:
    """What a Brownian bridge, in its standard deviations, exceeds with probability `error_rate` at any of the looks,
    which are equally far from each other, the last at its end.
    """
    steps = np.arange(1.0, looks)
    odds = steps / (looks - steps)
    keeping = np.sqrt(odds[:-1] / odds[1:])
    low, high = (float(scipy.special.ndtri(1 - rate)) for rate in (error_rate, error_rate / (looks - 1)))
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if _below(middle, keeping) < 1 - error_rate else (low, middle)
    return high


def _below(height: float, keeping: Any) -> float:
    """How likely a standard normal variable is to be below a height again and again, where it keeps such a share of
    itself each time: a convolution for each look (Armitage, McPherson and Rowe 1969, https://doi.org/10.2307/2343787).
    """
    nodes, shares = NODES
    places, shares = height - (1 - nodes) / 2 * SPAN, shares / 2 * SPAN
    density = _normal(places)
    for kept in keeping:
        width = math.sqrt(1 - kept**2)
        density = _normal((places[:, None] - kept * places) / width) / width @ (shares * density)
    return float(shares @ density)


def _normal(places: Any) -> Any:
    return np.exp(-(places**2) / 2) / math.sqrt(2 * math.pi)


def _gaps(own: ItemScores, rival: ItemScores, weights: Mapping[str, float]) -> dict[str, Any]:
    return {task: np.asarray(own[task], dtype=float) - np.asarray(rival[task][: len(own[task])]) for task in weights}


def _weighted(gaps: Mapping[str, Any], weights: Mapping[str, float]) -> float:
    return sum(weight * float(gaps[task].mean()) for task, weight in weights.items())


def _centred(rows: Any) -> Any:
    return rows - rows.mean(axis=-1, keepdims=True)
