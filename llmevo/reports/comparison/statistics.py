"""The numbers of a comparison: means with their errors, confidence bands, and tests of paired differences.

Few seeds are the rule, so the tests are exact and the bands those of Student's t: wide where little is known.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # its `stats` is opened when it is used

CONFIDENCE = 0.95
LEVEL = 1 - CONFIDENCE
ENOUGH = 6
"""Pairs from which Wilcoxon's test is used: with fewer no exact two-sided test can come below 0.05."""
SAME = 1e-12
"""Scores are sums of fractions: nearer than this they are ties."""
TIE = 11
"""Digits after the point of a difference: without those after them, equal differences of such sums are equal."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, its standard error (None for one seed) and the number of seeds."""

    mean: float
    stderr: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean | None":
        if not values:
            return None
        error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(float(np.mean(values)), error, len(values))

    @property
    def half_width(self) -> float:
        """Of the confidence interval; 0 where one seed leaves it unknown."""
        if self.stderr is None:
            return 0.0
        return float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, self.count - 1)) * self.stderr


@dataclass(frozen=True)
class Band:
    """Mean of several curves with its confidence band, place by place; None where a curve has no value yet."""

    mean: list[float | None]
    low: list[float | None]
    high: list[float | None]

    @classmethod
    def of(cls, curves: Sequence[Sequence[float | None]]) -> "Band":
        band = cls([], [], [])
        for values in zip(*curves, strict=False):  # as far as the shortest goes
            known = Mean.of([value for value in values if value is not None])
            whole = known if known and known.count == len(curves) else None
            band.mean.append(whole.mean if whole else None)
            band.low.append(whole.mean - whole.half_width if whole else None)
            band.high.append(whole.mean + whole.half_width if whole else None)
        return band


@dataclass(frozen=True)
class Paired:
    """One optimizer against another on the same seeds: the differences first - second."""

    pairs: int
    wins: int
    ties: int
    losses: int
    difference: Mean
    test: str
    p: float
    """Two-sided."""
    least: float
    """The lowest p that so many pairs could give."""

    @property
    def win_rate(self) -> float:
        """Ties count half."""
        return (self.wins + self.ties / 2) / self.pairs


def enough(tests: int) -> int:
    """Return the seeds with which one of so many tests can be significant after correction."""
    return 2 + math.floor(math.log2(tests / LEVEL))


def best_so_far(scores: Sequence[float | None]) -> list[float | None]:
    """Return the highest score after each evaluation; None stands for a failure, and for no score yet."""
    best: list[float | None] = []
    for score in scores:
        before = best[-1] if best else None
        best.append(before if score is None else score if before is None else max(before, score))
    return best


def reached(scores: Sequence[float | None], goal: float) -> int | None:
    """Return the first evaluation that reaches a score, counted from 1; None without one."""
    for place, score in enumerate(scores, start=1):
        if score is not None and score >= goal - SAME:
            return place
    return None


def median_reached(places: Sequence[int | None]) -> float | None:
    """Return the median, where None (never reached) is later than all; None when half or more are None."""
    median = float(np.median([math.inf if place is None else place for place in places])) if places else math.inf
    return median if math.isfinite(median) else None


def paired(first: Sequence[float], second: Sequence[float]) -> Paired | None:
    """Test two optimizers' scores seed by seed; None without pairs."""
    differences = [round(a - b, TIE) for a, b in zip(first, second, strict=True)]
    mean = Mean.of(differences)
    if mean is None:
        return None
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    count = wins + losses
    pairs, ties = len(differences), len(differences) - count
    test, p_value = ("Wilcoxon signed-rank", _wilcoxon) if count >= ENOUGH else ("sign-flip permutation", _sign_flip)
    return Paired(pairs, wins, ties, losses, mean, test, p_value(differences), 2.0 ** (1 - pairs))


def _sign_flip(differences: Sequence[float]) -> float:
    """Return the share of all sign flips whose mean lies as far from 0 as the observed one. Differences of 0, which no
    flip changes, are left out.
    """
    told = [difference for difference in differences if difference]
    if len(told) < 2:
        return 1.0
    result: Any = scipy.stats.permutation_test(
        (told,), lambda x: abs(np.mean(x)), permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    return float(result.pvalue)


def _wilcoxon(differences: Sequence[float]) -> float:
    """Exact also with ties among up to 16 differences; those of 0 say nothing and are left out."""
    told = [difference for difference in differences if difference]
    distinct = len({*map(abs, told)}) == len(told)
    every_flip: Any = scipy.stats.PermutationMethod(n_resamples=2**16)
    method: Any = "exact" if distinct else every_flip if len(told) <= 16 else "approx"
    result: Any = scipy.stats.wilcoxon(told, method=method)
    return float(result.pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """Correct several p-values (Holm 1979, https://www.jstor.org/stable/4615733)."""
    order, highest = sorted(range(len(ps)), key=lambda place: ps[place]), 0.0
    corrected = [1.0] * len(ps)
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = highest
    return corrected
