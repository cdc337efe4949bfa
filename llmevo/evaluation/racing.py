"""Racing: a candidate is asked block by block, and is stopped once it cannot overtake the best one.

The test is on its lead on all the questions, so the error falls to nothing as they are used up. The lead is estimated
from the paired differences to the best on the questions that both were asked, and from the answers of fully evaluated
candidates to the rest: merges of the same models get much the same questions right (the regression estimator of a
finite population; Cochran, Sampling Techniques, 1977, chapter 7).

One bound, in standard errors, serves for all looks (Pocock 1977, https://doi.org/10.1093/biomet/64.2.191), here for a
random walk whose end is given: a Brownian bridge. So of the candidates that would in the end lead by an answer or more,
at most the stated share is stopped, all looks together, as far as the questions are in random order and sums of
differences are nearly normal. Tasks may differ in size, weight, spread and unit: each has a variance of its own, see
`standard_errors`. `benchmarks/racing.py rates` measures the rate of wrong stops.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy  # its parts are opened when they are used

from llmevo.evaluation.standard_errors import Clusters, ItemScores, covariance, satterthwaite, spreads, unit

FEWEST = 16
"""Questions before the first look: a t-test on fewer says little."""

PREDICTORS = 4
"""So many of the best, and the mean of all, predict a candidate's answers."""

RIDGE = 4.0
"""The shrinkage of their coefficients to 0, in questions on which they differ."""

NODES: Any = np.polynomial.legendre.leggauss(200)
"""Of the integrals below a bound."""

SPAN = 10.0
"""The range of these integrals, in standard deviations."""


@dataclass(frozen=True)
class Difference:
    """A candidate's lead over a rival."""

    mean: float
    """Of the objective: Σ weight · metric. Below 0 the candidate is worse."""
    error: float
    """Its standard error: tasks are strata, equal questions are clusters."""
    freedom: float
    """The degrees of freedom of the error."""


def difference(
    own: ItemScores, rival: ItemScores, weights: Mapping[str, float], clusters: Clusters | None = None
) -> Difference:
    """The paired difference on the questions that both were asked, the rival's first ones, as an estimate for all
    questions of their kind. `same` names the questions that are asked twice.
    """
    gaps = _gaps(own, rival, weights)
    units = {task: unit([rival[task], own[task]]) for task in weights}
    scales = {task: weight * units[task] / len(gaps[task]) for task, weight in weights.items()}
    residuals = {task: _centred(gap) / units[task] for task, gap in gaps.items()}
    by_task, _ = spreads(residuals)
    parts = {task: (scales[task] ** 2 * len(gaps[task]) * by_task[task].variance, by_task[task]) for task in weights}
    twice = covariance({task: scales[task] * residuals[task] for task in weights}, clusters)
    variance = sum(part for part, _ in parts.values()) + twice
    return Difference(_weighted(gaps, weights), math.sqrt(variance), satterthwaite(parts))


def predict_gap(
    own: ItemScores, field: Sequence[ItemScores], weights: Mapping[str, float], clusters: Clusters | None = None
) -> Difference:
    """The predicted difference of a candidate to the first of the field on all questions. The field, the best first,
    was asked them all; the candidate the first ones of each task.

    The slopes are fitted to all tasks, in each task's `unit`. The variance is computed from leave-one-out residuals,
    and question by question where that is more (HC3; MacKinnon and White 1985,
    https://doi.org/10.1016/0304-4076(85)90158-7): where differences grow with the metric, the questions with the
    largest values decide.
    """
    gaps = _gaps(own, field[0], weights)
    units = _units(own, field, weights)
    answers = {task: np.array([one[task] for one in field], dtype=float) / units[task] for task in weights}
    answers = {task: np.vstack([rows[:PREDICTORS], rows.mean(axis=0)]) for task, rows in answers.items()}
    asked = {task: len(gap) for task, gap in gaps.items()}
    seen = {task: rows[:, : asked[task]] for task, rows in answers.items()}
    gap = {task: _centred(gaps[task]) / units[task] for task in weights}
    known = {task: _centred(seen[task]) for task in weights}
    # The field's mean answers to all questions, less those to the questions asked.
    shift = sum(w * units[t] * (answers[t].mean(axis=1) - seen[t].mean(axis=1)) for t, w in weights.items())
    inner: Any = sum(rows @ rows.T for rows in known.values())
    shrunk = inner + RIDGE * np.eye(len(inner))
    slopes = np.linalg.solve(shrunk, sum(known[task] @ gap[task] for task in weights))
    leverage = {task: (rows * np.linalg.solve(shrunk, rows)).sum(axis=0) for task, rows in known.items()}
    residuals = {task: (gap[task] - slopes @ known[task]) / (1 - leverage[task]) for task in weights}
    by_task, pooled = spreads(residuals)
    shifted = np.linalg.solve(shrunk, shift)
    parts: dict[str, tuple[float, Any]] = {}
    terms: dict[str, Any] = {}
    for task, weight in weights.items():
        left = 1 - asked[task] / answers[task].shape[1]
        terms[task] = weight * units[task] * math.sqrt(left) / asked[task] * residuals[task]
        spread, pull = by_task[task], (shifted @ known[task]) ** 2
        of_mean = (weight * units[task]) ** 2 * spread.variance * left / asked[task]
        of_slopes = max(spread.variance * float(pull.sum()), float((pull * residuals[task] ** 2).sum()))
        parts[task] = of_mean + of_slopes, spread
    variance = sum(part for part, _ in parts.values()) + pooled * RIDGE * float(shifted @ shifted)
    variance += covariance(terms, clusters)
    mean = _weighted(gaps, weights) + float(slopes @ shift)
    return Difference(mean, math.sqrt(variance), satterthwaite(parts))


def is_beaten(
    own: ItemScores,
    field: Sequence[ItemScores],
    weights: Mapping[str, float],
    look: int,
    looks: int,
    error_rate: float,
    clusters: Clusters | None = None,
) -> bool:
    """Return whether a candidate can be stopped at this look (from 1) of so many: a lead of an answer or more over the
    first of the field is ruled out, with this error rate. See `predict_gap`. A candidate that leads so far goes on, so
    no stopped one has a higher score than its rival.
    """
    if look >= looks or sum(len(own[task]) for task in weights) < FEWEST:
        return False
    if _weighted(_gaps(own, field[0], weights), weights) > 0:
        return False
    gap, units = predict_gap(own, field, weights, clusters), _units(own, field, weights)
    steps = [abs(weight) * units[task] / len(field[0][task]) for task, weight in weights.items() if weight]
    level = scipy.special.ndtr(bound(looks, error_rate))
    return bool(gap.mean - min(steps, default=0.0) < -scipy.special.stdtrit(gap.freedom, level) * gap.error)


@cache
def bound(looks: int, error_rate: float) -> float:
    """The height, in standard deviations, that a Brownian bridge exceeds with probability `error_rate` at any of the
    looks, which are equally far from each other, the last at its end.
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
    """The probability that a standard normal variable, which keeps these shares of itself from look to look, is below a
    height at every one: a convolution for each look (Armitage, McPherson and Rowe 1969,
    https://doi.org/10.2307/2343787).
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


def _units(own: ItemScores, field: Sequence[ItemScores], weights: Mapping[str, float]) -> dict[str, float]:
    """Each task's unit, by the answers of the candidate and the best of the field."""
    return {task: unit([field[0][task], own[task], *(one[task] for one in field[1:PREDICTORS])]) for task in weights}


def _weighted(gaps: Mapping[str, Any], weights: Mapping[str, float]) -> float:
    return sum(weight * float(gaps[task].mean()) for task, weight in weights.items())


def _centred(rows: Any) -> Any:
    return rows - rows.mean(axis=-1, keepdims=True)
