"""Statistics of the scores for the prompt, which an LLM cannot compute: effects and interactions of genes, verdicts on
hypotheses, and the questions that a recipe lost and gained.

For effects on the total, scores are replaced by the normal quantiles of their ranks, so that an outlier does not
dominate; effects on single tasks are in units of the metric.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import scipy  # its `stats` is loaded at its first use

from llmevo.evaluation.racing import difference
from llmevo.evaluation.score import error_of
from llmevo.evaluation.standard_errors import of_mean
from llmevo.search.prompts.question import Hypothesis, Question
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
    # Of a model alone all weights are high and the score is low, which would look like interactions of its weights.
    mixed = np.array([trial.candidate.origin != "parent" for trial in trials])
    return Evidence(effects, _interactions([genes[i] for i in paired], points[mixed][:, paired], residuals[mixed]))


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


# Effects on single tasks

CLEAR = 1.5
"""Standard errors from which on an effect is shown and a hypothesis is decided. (One-sided, a false one in fifteen.)"""


WIDTH = 2.0
"""Of the weights of trials by their distance from the best one, in median distances; see `task_effects`."""


@dataclass(frozen=True)
class TaskEffect:
    """The estimated effect of one gene on one task, or on the total."""

    task: str | None
    """None for the total."""
    gene: Gene
    slope: float
    """The change of the metric from the gene's lowest value to its highest, all other genes held."""
    stderr: float

    @property
    def strength(self) -> float:
        """The slope in standard errors, with its sign."""
        return self.slope / self.stderr if self.stderr > 0 else 0.0


def metric_of(question: Question, trial: Trial, task: str | None) -> float | None:
    """Return a trial's counted metric of a task, or its value where the task is None; None where it has none.

    It is of all questions. That of a stopped candidate is estimated, as its total is: the best trial's metric and the
    mean difference on the questions that both were asked. It is None where the scores of single questions are missing.
    """
    if trial.score is None:
        return None
    if task is None or trial.score.items >= question.items:
        return trial.value if task is None else trial.score.tasks.get(task, {}).get(question.tasks[task][1])
    best = question.whole[0]
    whole, own = metric_of(question, best, task), trial.score.item_scores.get(task, ())
    other = best.score.item_scores.get(task, ())[: len(own)] if best.score else ()
    if whole is None or not own or len(other) < len(own):
        return None
    found = whole + float(np.mean(own) - np.mean(other))
    return min(max(found, 0.0), 1.0) if min(*own, *other) >= 0 and max(*own, *other) <= 1 else found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; 0 for what cannot be known from so few values, or from sizes beyond the
    range of floating-point numbers.
    """
    try:
        return (
            fmean(values) if values else 0.0,
            stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0,
        )
    except (OverflowError, AttributeError):  # as `statistics` fails with infinite sums
        return 0.0, 0.0


def task_effects(question: Question) -> list[TaskEffect]:
    """Return the effects beyond `CLEAR` standard errors on the total and on each task, the strongest of each first.

    By Bayesian ridge regression, as `estimate_effects`, in which a trial counts the more, the nearer it is to the best
    one (local regression: Cleveland 1979, https://doi.org/10.1080/01621459.1979.10481038). Empty below `FEWEST` scores.
    """
    genes = [gene for gene in question.space.genes if not gene.choices]
    if len(question.inside) < FEWEST or not genes:
        return []
    from sklearn.linear_model import BayesianRidge  # slow to import

    points, nearness, found = _points(question), _nearness(question), list[TaskEffect]()
    for task in (None, *question.tasks):
        values = [metric_of(question, trial, task) for trial in question.inside]
        known = [place for place, value in enumerate(values) if value is not None and math.isfinite(value)]
        scores = np.array([values[place] for place in known], dtype=float)
        if len(known) < FEWEST or np.ptp(scores) == 0:
            continue
        with np.errstate(over="ignore", under="ignore"):
            spread = float(scores.std())  # the regression's priors are for scores of about this size
        if not 0 < spread < math.inf:
            continue
        ridge: Any = BayesianRidge().fit(points[known], scores / spread, sample_weight=nearness[known])
        errors = np.sqrt(np.maximum(np.diag(ridge.sigma_), 0.0))
        own = [
            TaskEffect(task, gene, spread * float(slope), spread * float(error))
            for gene, slope, error in zip(genes, ridge.coef_, errors, strict=True)
        ]
        found += sorted((e for e in own if abs(e.strength) > CLEAR), key=lambda effect: -abs(effect.strength))
    return found


def _nearness(question: Question) -> Array:
    """The weight of each trial inside: 1 for the best one, less with the distance from it."""
    points = _points(question)
    best = points[max(range(len(points)), key=lambda place: question.inside[place].value)]
    squares = ((points - best) ** 2).sum(axis=1)
    width = WIDTH**2 * float(np.median(squares))
    return np.exp(-0.5 * squares / width) if width else np.ones(len(points))


# Paired comparisons


@dataclass(frozen=True)
class Gap:
    """The difference of two trials' scores."""

    mean: float
    """Positive where the first is better."""
    stderr: float


def gap(question: Question, first: Trial, second: Trial, task: str | None = None) -> Gap | None:
    """Return the lead of one trial over another at a task, or of the total where it is None.

    Paired on the questions that both were asked; from the two standard errors where the scores of single questions are
    missing. None where a score is missing. Where lower is better, a lower metric leads.
    """
    if not (first.score and second.score):
        return None
    tasks = [*question.tasks] if task is None else [task]
    weights = {name: question.tasks[name][0] for name in tasks}
    if task is not None:
        weights = {task: math.copysign(1.0, weights[task])}
    one, other = first.score.item_scores, second.score.item_scores
    whole = task is not None or not question.weights  # with several objectives the value is no sum of tasks
    shared = {name: min(len(one.get(name, ())), len(other.get(name, ()))) for name in tasks}
    if whole and min(shared.values()) > 1:  # a stopped candidate was asked the first ones
        own, rival = ({name: scores[name][:count] for name, count in shared.items()} for scores in (one, other))
        found = difference(own, rival, weights)
        return Gap(found.mean, found.error)
    values = metric_of(question, first, task), metric_of(question, second, task)
    if values[0] is None or values[1] is None:
        return None
    errors = stderr_of(question, first, task), stderr_of(question, second, task)
    sign = 1.0 if task is None else weights[task]
    return Gap(sign * (values[0] - values[1]), math.hypot(*errors))


def stderr_of(question: Question, trial: Trial, task: str | None = None) -> float:
    """Return the standard error of a trial's metric of a task, or of its total where the task is None; 0 where it is
    not known.
    """
    if trial.score is None:
        return 0.0
    if task is None:
        return trial.score.stderr
    error = trial.score.tasks.get(task, {}).get(error_of(question.tasks[task][1]))
    if error is None and (items := trial.score.item_scores.get(task)):
        error = of_mean(items)
    return error if error is not None and math.isfinite(error) else 0.0


@dataclass(frozen=True)
class Verdict:
    """The decision of the scores on a hypothesis."""

    hypothesis: Hypothesis
    word: str
    """`supported`, `refuted` or `open`."""
    better: Trial | None
    """The trial of its better recipe; None if it was not scored."""
    worse: Trial | None
    effect: Gap | None = None


def verdict(question: Question, hypothesis: Hypothesis) -> Verdict:
    """Compare the two recipes of a hypothesis: see `gap` and `CLEAR`."""
    better, worse = (_trial_of(question, genes) for genes in (hypothesis.better, hypothesis.worse))
    task = hypothesis.task if hypothesis.task in question.tasks else None
    effect = gap(question, better, worse, task) if better and worse else None
    if effect is None or abs(effect.mean) <= CLEAR * effect.stderr:
        return Verdict(hypothesis, "open", better, worse, effect)
    return Verdict(hypothesis, "supported" if effect.mean > 0 else "refuted", better, worse, effect)


def _trial_of(question: Question, genes: Mapping[str, float]) -> Trial | None:
    """The scored trial of a recipe, to a thousandth of each gene's range."""
    if not question.space.contains(genes):
        return None
    point = question.space.to_unit(genes)
    near = [t for t, other in zip(question.inside, question.points, strict=True) if abs(point - other).max() < 1e-3]
    return max(near, key=lambda trial: trial.score.items if trial.score else 0, default=None)


@dataclass(frozen=True)
class Flips:
    """The questions of a task that the best trial answers otherwise than the best parent at that task."""

    task: str
    parent: Trial
    lost: Sequence[int]
    """Questions, by their place, that the parent answers and the best trial does not."""
    gained: Sequence[int]
    rescued: Mapping[str, Sequence[int]]
    """{parent: the lost questions that it answers alone}, the parent with the most first."""


def flips(question: Question) -> list[Flips]:
    """Compare the best trial with the best parent at each task, question by question. Tasks whose questions have no
    scores of 0 and 1, or another number of them, are left out.
    """
    best = question.best
    if best is None or best.candidate.origin == "parent":
        return []
    found: list[Flips] = []
    for task in question.tasks:
        parent = best_parent(question, task)
        own = _answers(best, task)
        if parent is None or not own or len(_answers(parent, task)) != len(own):
            continue
        sign = math.copysign(1.0, question.tasks[task][0])
        changes = [sign * (a - b) for a, b in zip(own, _answers(parent, task), strict=True)]
        lost = [place for place, change in enumerate(changes) if change < 0]
        right = 1.0 if sign > 0 else 0.0
        by_parent = {
            each.candidate.note: [place for place in lost if answers[place] == right]
            for each in question.parents
            if len(answers := _answers(each, task)) == len(own)
        }
        rescued = {name: places for name, places in by_parent.items() if places}
        order = sorted(rescued, key=lambda name: -len(rescued[name]))
        gained = [place for place, change in enumerate(changes) if change > 0]
        found.append(Flips(task, parent, lost, gained, {name: rescued[name] for name in order}))
    return found


def _answers(trial: Trial, task: str) -> Sequence[float]:
    """The scores of a task's questions; empty unless each is 0 or 1."""
    answers = trial.score.item_scores.get(task, ()) if trial.score else ()
    return answers if {*answers} <= {0, 1} else ()


def best_parent(question: Question, task: str) -> Trial | None:
    """Return the parent with the best counted metric of a task."""
    sign = math.copysign(1.0, question.tasks[task][0])
    known = [(trial, value) for trial in question.parents if (value := metric_of(question, trial, task)) is not None]
    return max(known, key=lambda pair: sign * pair[1])[0] if known else None
