"""The score of several tasks, and of several blocks of their questions, as one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from types import MappingProxyType
from typing import Any

import numpy as np

from llmevo.errors import CandidateError
from llmevo.evaluation import standard_errors
from llmevo.evaluation.standard_errors import Clusters, ItemScores
from llmevo.evaluation.tasks.task import Task

SAMPLES = "sample_len"
"""lm-eval's key of a task's number of questions."""

Metrics = Mapping[str, Mapping[str, float]]
"""{task: {metric: value}}, with the names of lm-eval (`acc,none`, `acc_stderr,none`)."""


DIGITS = 4
"""Of a value in the log."""


def logged(value: float) -> float:
    """Return a value as the log has it: with four digits after the point, or of small ones four that count."""
    return round(value, DIGITS) if abs(value) >= 0.1 else float(f"{value:.{DIGITS}g}")


@dataclass(frozen=True)
class Score:
    """A model's results on the tasks. Higher is better."""

    total: float
    """Σ weight · metric over the tasks."""
    stderr: float
    """The standard error of `total`, from the tasks' own."""
    tasks: Metrics
    items: int
    """Questions answered."""
    item_scores: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    """{task: the counted metric of every question, in their order}; a group's tasks one by one. Without tasks whose
    metric no single question has, such as word perplexity."""
    replies: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    """{task: the model's reply to every question}: its text, or its choice."""


def aggregate(
    tasks: Sequence[Task],
    results: Mapping[str, Mapping[str, Any]],
    items: int,
    means: ItemScores = MappingProxyType({}),
    clusters: Clusters | None = None,
) -> Score:
    """The objective, Σ weight · metric, and its standard error: see `llmevo.evaluation.standard_errors`.

    `means` are the question scores of tasks whose metric is their mean: the standard errors of these follow from them.
    Those of other tasks are lm-eval's. `clusters` are the questions that are asked twice.
    """
    deviations = {
        task.name: task.weight * (np.asarray(own, dtype=float) - np.mean(own)) / len(own)
        for task in tasks
        if (own := means.get(task.name)) is not None
    }
    total, variance = 0.0, standard_errors.covariance(deviations, clusters)
    metrics: dict[str, dict[str, float]] = {}
    for task in tasks:
        found = {key: float(value) for key, value in results[task.name].items() if isinstance(value, Real)}
        value = found.get(task.metric, math.nan)
        if not math.isfinite(value):
            given = results[task.name]
            if task.metric not in given:
                others = ", ".join(key for key in found if "_stderr" not in key)
                raise CandidateError(f"{task.name} gave no metric {task.metric}; it gave {others or 'none'}")
            raise CandidateError(f"the metric {task.metric} of {task.name} is {given[task.metric]}, not a number")
        total += task.weight * value
        error = error_of(task.metric)
        own = means.get(task.name)
        stderr = found.get(error, 0.0) if own is None else standard_errors.of_mean(own)
        variance += (task.weight * stderr) ** 2 if math.isfinite(stderr) else 0.0
        if own is not None:
            alone = (np.asarray(own, dtype=float) - np.mean(own)) / len(own)
            found[error] = math.sqrt(stderr**2 + standard_errors.covariance({task.name: alone}, clusters))
        metrics[task.name] = {key: value for key, value in found.items() if math.isfinite(value)}
    return Score(total=total, stderr=math.sqrt(variance), tasks=metrics, items=items)


def concatenate(tasks: Sequence[Task], parts: Sequence[Score], clusters: Clusters | None = None) -> Score:
    """The score on several blocks together, as if they had been asked at once. Only for tasks whose metrics are means
    over questions. The first block has questions of every task. Raises CandidateError for a task that gives its metric
    for some questions only.
    """
    if len(parts) == 1:
        return parts[0]
    lacking = (t for t in tasks if any(t.name in part.tasks and t.name not in part.item_scores for part in parts))
    if task := next(lacking, None):
        raise CandidateError(
            f"the task {task.name} gives {task.metric!r} for some of its questions only, so they cannot be"
            " asked in blocks; correct its process_results, or set `search: {racing: false}`"
        )
    item_scores = _joined(parts)
    replies = {name: [r for part in parts for r in part.replies.get(name, ())] for name in parts[0].replies}
    results: dict[str, dict[str, float]] = {}
    for task in tasks:
        asking = [part for part in parts if task.name in part.tasks]
        counts = np.array([len(part.item_scores[task.name]) for part in asking], dtype=float)
        shares = counts / counts.sum()
        for key in parts[0].tasks[task.name]:
            values = np.array([part.tasks[task.name].get(key, math.nan) for part in asking])
            # A standard error falls with the number of questions; the counted metric's follows from its questions.
            if "_stderr," in key:
                value = math.sqrt(float((shares**2 * values**2).sum()))
            else:
                value = float((values if key == SAMPLES else shares * values).sum())
            results.setdefault(task.name, {})[key] = value
        own = item_scores[task.name]
        results[task.name][task.metric] = sum(own) / len(own)
    whole = aggregate(tasks, results, sum(map(len, item_scores.values())), item_scores, clusters)
    return replace(whole, item_scores=item_scores, replies=replies)


def pooled(tasks: Sequence[Task], scores: Sequence[Score], clusters: Clusters | None = None) -> Score:
    """The score on several sets of questions together, without the tasks' metrics: each task has the mean over all its
    questions. A metric that is no mean over questions is averaged by the sets' numbers of questions. `clusters` are
    those of the sets' questions, one set after the other.
    """
    items, joined = sum(score.items for score in scores), _joined(scores)
    # Earlier logs have values of the questions of a perplexity, and later ones none.
    answered = {
        name: own
        for name, own in joined.items()
        if all(name in score.item_scores for score in scores if name in score.tasks)
    }
    results: dict[str, dict[str, float]] = {}
    for task in tasks:
        if own := answered.get(task.name):
            results[task.name] = {task.metric: math.fsum(own) / len(own)}
            continue
        error = error_of(task.metric)
        shares = [(score.items / items, score.tasks[task.name]) for score in scores]
        value = sum(share * metrics[task.metric] for share, metrics in shares)
        stderr = math.sqrt(sum((share * metrics.get(error, 0.0)) ** 2 for share, metrics in shares))
        results[task.name] = {task.metric: value, error: stderr}
    means = {task.name: own for task in tasks if (own := answered.get(task.name))}
    return replace(aggregate(tasks, results, items, means, clusters), tasks={}, item_scores=answered)


def averaged(scores: Sequence[Score]) -> Score:
    """The mean of the scores on several sets of questions, by their numbers of questions, without the tasks' metrics:
    in logs with `rules` below 4, where tasks with few further questions counted too much.
    """
    items = sum(score.items for score in scores)
    total = sum(score.total * score.items for score in scores) / items
    stderr = math.sqrt(sum((score.stderr * score.items) ** 2 for score in scores)) / items
    return Score(total, stderr, {}, items, _joined(scores))


def _joined(scores: Sequence[Score]) -> dict[str, list[float]]:
    """The questions' scores of several sets, one set after the other."""
    return {name: [v for score in scores for v in score.item_scores.get(name, ())] for name in scores[0].item_scores}


def error_of(metric: str) -> str:
    """Return the name of a metric's standard error, as lm-eval has it: `acc_stderr,none` of `acc,none`."""
    name, _, filter_ = metric.partition(",")
    return f"{name}_stderr,{filter_}"


def metric_of(tasks: Metrics, name: str, metric: str) -> tuple[float | None, float | None]:
    """Return a task's counted metric and its standard error; None where the score lacks them."""
    found = tasks.get(name, {})
    return found.get(metric), found.get(error_of(metric))
