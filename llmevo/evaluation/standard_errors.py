"""Standard errors of weighted sums of tasks' means: of scores, of paired differences, of the predictions of racing.

All of them treat the tasks as strata with a variance each. Answers to the same question, asked by several tasks, are
one cluster: their covariance is added.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PRIOR = 4.0
"""Degrees of freedom that the variance pooled over the tasks counts in that of a task."""

ItemScores = Mapping[str, Sequence[float]]
"""{task: the counted metric of every question}."""

Clusters = Mapping[str, Sequence[int]]
"""{task: a number for every question}; equal numbers, within a task or across tasks, are the same question."""


@dataclass(frozen=True)
class Spread:
    """The variance of one question's value."""

    variance: float
    freedom: float
    """Its degrees of freedom."""


def one_after_another(sets: Iterable[Clusters]) -> Clusters:
    """The numbers of several sets of questions, of which none shares a question with another."""
    found: dict[str, list[int]] = {}
    first = 0
    for numbers in sets:
        for task, own in numbers.items():
            found.setdefault(task, []).extend(first + number for number in own)
        first += 1 + max((max(own, default=0) for own in numbers.values()), default=0)
    return found


def distinct(numbers: Clusters) -> int:
    """The number of different questions."""
    return len({number for own in numbers.values() for number in own})


def unit(answers: Iterable[Any]) -> float:
    """The size of a difference between two answers to a question, in the metric's own unit: the root mean square of
    the differences that are not 0. 1 for right and wrong answers. `answers` are rows of one task's questions: the
    others, which may be of fewer questions, are compared with the first.

    Where all answers are the same it is the range of the questions' values, or 1 if that is 0 too.
    """
    first, *others = (np.asarray(row, dtype=float) for row in answers)
    gaps = [other - first[: len(other)] for other in others]
    unlike = np.concatenate([gap[gap != 0] for gap in gaps]) if gaps else np.empty(0)
    if len(unlike):
        return math.sqrt(float((unlike**2).mean()))
    return float(np.ptp(first)) or 1.0


def spreads(residuals: Mapping[str, Any]) -> tuple[dict[str, Spread], float]:
    """Each task's variance of a question, and the pooled one, from residuals in comparable units: see `unit`.

    A task's variance is drawn towards the pooled one, which counts `PRIOR` degrees of freedom, as with an inverse-gamma
    prior (Smyth 2004, https://doi.org/10.2202/1544-6115.1027), but never below its own: a task that varies more than
    the others is not hidden by them. To all tasks together one unlike answer is added, half of it in either direction,
    so that a few equal answers are no certainty (a half in each cell of a table of pairs: Agresti and Min 2005,
    https://doi.org/10.1002/sim.1781).
    """
    freedoms = {task: max(0, len(own) - 1) for task, own in residuals.items()}
    total = max(1, sum(freedoms.values()))
    squares = {task: float((own**2).sum()) + freedoms[task] / total for task, own in residuals.items()}
    pooled = max(sum(squares.values()), 1.0) / total
    found: dict[str, Spread] = {}
    for task, freedom in freedoms.items():
        variance = (PRIOR * pooled + squares[task]) / (PRIOR + freedom)
        borrowed = min(PRIOR, total - freedom)  # none where there is no other task
        found[task] = Spread(max(variance, squares[task] / max(1, freedom)), max(1.0, freedom + borrowed))
    return found, pooled


def satterthwaite(parts: Mapping[str, tuple[float, Spread]]) -> float:
    """The degrees of freedom of a sum of estimated variances (Satterthwaite 1946, https://doi.org/10.2307/3002019),
    from each task's part of it and the spread that the part was estimated by.
    """
    total = sum(part for part, _ in parts.values())
    below = sum(part**2 / spread.freedom for part, spread in parts.values())
    most = sum(spread.freedom for _, spread in parts.values())
    return min(most, max(1.0, total**2 / below)) if below else most


def covariance(influences: Mapping[str, Any], clusters: Clusters | None) -> float:
    """Return the variance that repeated questions add: the sum of the products of different terms of a cluster (the
    cluster-robust variance; Liang and Zeger 1986, https://doi.org/10.1093/biomet/73.1.13). `influences` are the terms'
    deviations. Not below 0.
    """
    if (
        not clusters
        or not influences
        or not all(task in clusters and len(own) <= len(clusters[task]) for task, own in influences.items())
    ):
        return 0.0
    terms = np.concatenate([np.asarray(own) for own in influences.values()])
    numbers = np.concatenate([np.asarray(clusters[task][: len(own)], dtype=int) for task, own in influences.items()])
    return max(0.0, float((np.bincount(numbers, terms) ** 2).sum() - (terms**2).sum()))


def of_mean(values: Sequence[float]) -> float:
    """The standard error of a mean over questions.

    Of shares (every value is 0 or 1) that of Agresti and Coull with z = 1 (1998, https://doi.org/10.2307/2685469): one
    answer is added, half right and half wrong, so that 0 of 8 is no certainty. Of other metrics the standard deviation
    over √n; 0 for a single question.
    """
    count = len(values)
    if {*values} <= {0, 1}:
        share = (sum(values) + 0.5) / (count + 1)
        return math.sqrt(share * (1 - share) / (count + 1))
    return float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else 0.0
