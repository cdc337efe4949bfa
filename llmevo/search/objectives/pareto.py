"""The Pareto front: candidates than which none is better at one task without being worse at another."""

from collections.abc import Sequence

import numpy as np

from llmevo.search.objectives.objective import Objective
from llmevo.search.trial import Trial


def front(trials: Sequence[Trial], aims: Objective) -> list[Trial]:
    """Of trials that were asked the same questions, those that no other dominates, in the order given; equal ones all.

    Constraints come first (Deb et al. 2002, https://doi.org/10.1109/4235.996017, section VI): who keeps them dominates
    who does not. Where nobody keeps them, the front is the one that misses them least. By measured scores: two that
    differ by less than their standard errors may both be there by luck.
    """
    keeping = [trial for trial in trials if trial.score and not trial.violation]
    if not keeping:
        scored = [trial for trial in trials if trial.score]
        return [min(scored, key=lambda trial: trial.violation)] if scored else []
    placed = [
        (trial, heights)
        for trial in keeping
        if trial.score and (heights := aims.heights(trial.score.tasks)) is not None
    ]
    if not placed:
        return []
    points = np.array([heights for _, heights in placed])
    return [trial for trial, own in placed if not ((points >= own).all(axis=1) & (points > own).any(axis=1)).any()]
