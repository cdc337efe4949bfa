"""Merges of the fewest models that together come near the best parent of every task, a weighted set cover.

Where the skills of models overlap, merges of some of them have peaks of their own, far from the merges of all, and the
scores of the models alone tell which. As few as two models may have all that the others add.
"""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from llmevo.search.evidence import metric_of
from llmevo.search.prompts.question import Question
from llmevo.search.space import Array, Genes, SearchSpace
from llmevo.search.trial import Suggestion, Trial

KEPT = 0.8
"""The share that a set has to keep of the gain from the best single model to the best model of every task."""

MERGES = 2
"""The most merges that are proposed."""

SUBSETS = 20_000
"""The most sets of one size that are compared; beyond, none is proposed."""


def used_models(space: SearchSpace, genes: Genes) -> frozenset[str]:
    """Return the models with a weight other than 0."""
    return frozenset(model for name, model in _weights(space).items() if genes.get(name))


def covers(question: Question) -> list[Suggestion]:
    """Return merges of the smallest sets of two or more models, not of all, that keep most of the best parents' scores
    together, the best first.

    The models have the weights of the best merge with one weight for all, times the number of all models over theirs:
    the sum of the weights stays the same. Empty where a single model is enough or only all are, where a parent has no
    score for a task, and where weights cannot be 0.
    """
    space = question.space
    weights = _weights(space)
    models = [*dict.fromkeys(weights.values())]
    start = _best_shared(question)
    can_be_0 = all(gene.low <= 0.0 <= gene.high for gene in space.genes if gene.name in weights)
    scores = {trial.candidate.note: _by_task(question, trial) for trial in question.parents}
    is_known = all(np.isfinite(scores.get(model, math.nan)).all() for model in models)
    if start is None or len(models) < 3 or not can_be_0 or not is_known:
        return []
    whole, single = _together(scores, models), max(_together(scores, [model]) for model in models)
    least = single + KEPT * (whole - single)
    for size in range(1, len(models)):
        if math.comb(len(models), size) > SUBSETS:
            break
        if sets := [some for some in combinations(models, size) if _together(scores, some) >= least]:
            sets.sort(key=lambda some: -_together(scores, some))
            return [_merge(space, start, some) for some in sets[:MERGES] if size > 1]
    return []


def _weights(space: SearchSpace) -> dict[str, str]:
    """Return {gene: the model whose weight it is}."""
    return {gene.name: gene.model for gene in space.genes if gene.parameter == "weight" and gene.model}


def _best_shared(question: Question) -> Trial | None:
    """Return the best merge with one weight for all models."""
    return next((of for of in question.whole if of.candidate.origin in ("uniform", "coefficient")), None)


def _by_task(question: Question, parent: Trial) -> Array:
    """Return the terms of a parent's score, a number for each task; NaN where one is unknown."""
    found = [(factor, metric_of(question, parent, task)) for task, (factor, _) in question.tasks.items()]
    return np.array([math.nan if value is None else factor * value for factor, value in found])


def _together(scores: dict[str, Array], models: Sequence[str]) -> float:
    """Return the score of a model that is at every task as good as the best one of some."""
    return float(np.max([scores[model] for model in models], axis=0).sum())


def _merge(space: SearchSpace, start: Trial, models: Sequence[str]) -> Suggestion:
    """Return the best merge with one weight for all models, of some of them."""
    weights, genes = _weights(space), {**start.candidate.genes}
    factor = len({*weights.values()}) / len(models)
    genes |= {name: genes[name] * factor if model in models else 0.0 for name, model in weights.items()}
    return Suggestion(space.clamp(genes), "gaussian", f"covers the tasks: {', '.join(models)}")
