"""The Pareto front: the candidates that no other one dominates."""

from collections.abc import Sequence

import numpy as np

from llmevo.search.objectives.objective import Objective
from llmevo.search.trial import Trial


def front(trials: Sequence[Trial], aims: Objective) -> list[Trial]:
    """Return the trials that no other dominates, in the order given; all have scores on the same questions.

    Feasible trials dominate infeasible ones (Deb et al. 2002, https://doi.org/10.1109/4235.996017, section VI); without
    a feasible one the front is the trial with the least violation. Standard errors do not count.
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
