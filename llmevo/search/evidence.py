"""Statistics of the scores for the prompt, which an LLM cannot compute: effects and interactions of genes.

Scores are replaced by the normal quantiles of their ranks, so that an outlier does not dominate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import scipy  # its `stats` is loaded at its first use

from llmevo.search.prompts.question import Question
from llmevo.search.space import Array, Gene
from llmevo.search.trial import Trial

FEWEST = 6  # scored points below which nothing is computed
PAIRED = 64  # genes whose pairs are tested: those with the strongest effects
EXPECTED_FALSE = 0.5  # the expected number of false interactions: of thousands of pairs some always look strong


@dataclass(frozen=True)
class Effect:
    """The estimated effect of one gene."""

    gene: Gene
    slope: float
    """Change of the rank-normal score from the gene's lowest value to its highest, all other genes held."""
    stderr: float
    contrast: float
    """Mean of the best quarter minus mean of the rest, in shares of the gene's range."""
    lowest: float
    """The lowest value tried."""
    highest: float

    @property
    def strength(self) -> float:
        """The slope in standard errors, with its sign."""
        return self.slope / self.stderr if self.stderr > 0 else 0.0


@dataclass(frozen=True)
class Interaction:
    """Two genes whose joint effect is not the sum of their effects."""

    first: Gene
    second: Gene
    strength: float
    """In standard errors; positive when the score rises if both are high, or both low."""


@dataclass(frozen=True)
class Evidence:
    """The estimates from the scored points of the space."""

    effects: Sequence[Effect]
    """For every numeric gene; empty while there are too few scores, or all are equal."""
    interactions: Sequence[Interaction]
    """The strongest first."""


def estimate_effects(question: Question) -> Evidence:
    """Estimate effects by Bayesian ridge regression (MacKay 1992, https://doi.org/10.1162/neco.1992.4.3.415)."""
    trials = question.inside
    genes = [gene for gene in question.space.genes if not gene.choices]
    values = [trial.value for trial in trials]
    if len(trials) < FEWEST or min(values) == max(values) or not genes:
        return Evidence((), ())
    from sklearn.linear_model import BayesianRidge  # slow to import

    points, scores = _points(question), rank_normal(values)
    ridge: Any = BayesianRidge().fit(points, scores)
    errors = np.sqrt(np.maximum(np.diag(ridge.sigma_), 0.0))
    top = np.array(values) >= np.quantile(values, 0.75)
    contrasts = points[top].mean(0) - points[~top].mean(0) if 0 < top.sum() < len(top) else np.zeros(len(genes))
    effects = [
        Effect(
            gene,
            float(ridge.coef_[i]),
            float(errors[i]),
            float(contrasts[i]),
            min(trial.candidate.genes[gene.name] for trial in trials),
            max(trial.candidate.genes[gene.name] for trial in trials),
        )
        for i, gene in enumerate(genes)
    ]
    paired = sorted(sorted(range(len(genes)), key=lambda i: -abs(effects[i].strength))[:PAIRED])
    residuals = scores - ridge.predict(points)
    return Evidence(effects, _interactions([genes[i] for i in paired], points[:, paired], residuals))


def _points(question: Question) -> Array:
    """(trials, numeric genes) in the unit cube; a gene without effect on a recipe has the mean of the others."""
    space = question.space
    numeric = [not gene.choices for gene in space.genes]
    points = question.points[:, numeric]
    if all(numeric):
        return points
    active = np.array([space.active(trial.candidate.genes) for trial in question.inside])[:, numeric]
    means = np.where(active, points, 0.0).sum(0) / np.maximum(active.sum(0), 1)
    return np.where(active, points, means)


def rank_normal(values: Sequence[float]) -> Array:
    """Return the normal quantile of each value's rank; equal values stay equal."""
    ranks = scipy.stats.rankdata(values)
    return np.asarray(scipy.stats.norm.ppf((ranks - 0.5) / len(values)), dtype=np.float64)


def _interactions(genes: Sequence[Gene], points: Array, residuals: Array) -> list[Interaction]:
    """Pairs whose product explains the residuals of the linear effects, by a t-test of the correlation."""
    count = len(points)
    first, second = np.triu_indices(len(genes), 1)
    if count < 2 * FEWEST or not len(first):
        return []
    centred = points - points.mean(0)
    products = centred[:, first] * centred[:, second]
    products -= products.mean(0)
    sizes = np.sqrt((products**2).sum(0) * (residuals**2).sum())
    usable = sizes > 1e-12
    correlations = np.zeros(len(first))
    correlations[usable] = (residuals @ products)[usable] / sizes[usable]
    strengths = correlations * np.sqrt((count - 2) / np.maximum(1e-12, 1 - correlations**2))
    chances = 2 * np.asarray(scipy.stats.t.sf(np.abs(strengths), count - 2))
    found = [int(i) for i in np.argsort(-np.abs(strengths)) if chances[i] * len(first) < EXPECTED_FALSE]
    return [Interaction(genes[first[i]], genes[second[i]], float(strengths[i])) for i in found]


def target(question: Question) -> float | None:
    """Return the best score plus a quarter of its lead over the median, at most the highest possible one; None before
    there are two scores. (A target to condition on, as in LLAMBO, https://arxiv.org/abs/2402.03921.)
    """
    values = [trial.value for trial in question.scored]
    if len(values) < 2:
        return None
    best = max(values)
    return max(best, min(best + 0.25 * (best - median(values)), ceiling(question)))


def ceiling(question: Question) -> float:
    """Return the highest possible total; infinite unless every metric so far lies in [0, 1]."""
    if question.weights:  # no gap to the best of any task
        return 1.0
    seen = [
        trial.score.tasks[task][metric]
        for trial in question.scored
        for task, (_, metric) in question.tasks.items()
        if trial.score and metric in trial.score.tasks.get(task, {})
    ]
    if not all(0 <= value <= 1 for value in seen):
        return float("inf")
    return sum(max(weight, 0.0) for weight, _ in question.tasks.values())


def calibration(predictions: Sequence[tuple[float, float]]) -> float | None:
    """Return Spearman's correlation of predicted and actual scores; None for fewer than three or a constant."""
    if len(predictions) < 3 or any(len({*column}) < 2 for column in zip(*predictions, strict=True)):
        return None
    expected, actual = zip(*predictions, strict=True)
    found: Any = scipy.stats.spearmanr(expected, actual)
    return float(found.statistic)


def contrasts(question: Question, count: int) -> list[Trial]:
    """Return the points of the worse half that lie nearest to the best one."""
    trials = question.inside
    ranked = sorted(range(len(trials)), key=lambda place: trials[place].value)
    worse = ranked[: len(ranked) // 2]
    if not worse:
        return []
    active = question.space.active(trials[ranked[-1]].candidate.genes)
    far = np.square(question.points - question.points[ranked[-1]])[:, active].sum(1)
    return [trials[place] for place in sorted(worse, key=lambda place: far[place])[:count]]
