"""One value for optimizers in the place of constraints and several objectives.

The value of a trial changes with the other scores and with the random weights of the generation, so optimizers are told
again (`Optimizer.retell`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from llmevo.evaluation.score import Score
from llmevo.search.objectives.objective import Objective
from llmevo.search.trial import Trial

SUM_SHARE = 0.05  # ρ of the augmented Chebyshev norm in ParEGO


def random_weights(objective: Objective, generation: int) -> dict[str, float]:
    """Return random weights of the objectives, with the sum 1, for a generation; empty where the objective is the sum.

    They are uniform on the simplex; ParEGO (Knowles 2006, https://doi.org/10.1109/TEVC.2005.851274) draws from a
    lattice.
    """
    if not objective.pareto:
        return {}
    drawn = np.random.default_rng([objective.seed, generation]).dirichlet(np.ones(len(objective.objectives)))
    return dict(zip(objective.objectives, map(float, drawn), strict=True))


def scalarize(
    trials: Sequence[Trial], known: Sequence[Trial], objective: Objective, weights: Mapping[str, float]
) -> list[Trial]:
    """Return the trials with their current values, given all known ones.

    With `weights` (see `random_weights`) the score becomes 1 minus the augmented Chebyshev distance to the best known
    value of each objective. An infeasible trial has a lower value than all feasible ones, by its violation (Deb 2000);
    the penalty stays within the spread of the scores, so that a surrogate can model it.
    """
    if objective.plain:
        return [*trials]
    if weights:
        scale = _scale(known, objective)
        known, trials = ([_scalarised(trial, objective, weights, scale) for trial in of] for of in (known, trials))
    totals = [trial.score.total for trial in known if trial.score]
    floor = min((trial.score.total for trial in known if trial.score and not trial.violation), default=None)
    lowest = min(totals, default=0.0) if floor is None else floor
    spread = (max(totals, default=0.0) - min(totals, default=0.0)) or 1.0
    return [
        replace(trial, scalarized=lowest - spread * trial.violation / (1 + trial.violation))
        if trial.score and trial.violation
        else trial
        for trial in trials
    ]


def _scale(known: Sequence[Trial], objective: Objective) -> list[tuple[float, float]]:
    """The best known value of each objective, and its range."""
    maximized = [
        found for trial in known if trial.score and (found := objective.maximized(trial.score.tasks)) is not None
    ]
    return [(max(column), (max(column) - min(column)) or 1.0) for column in zip(*maximized, strict=True)]


def _scalarised(
    trial: Trial, objective: Objective, weights: Mapping[str, float], scale: Sequence[tuple[float, float]]
) -> Trial:
    """The trial with the scalarized score and its standard error to first order."""
    score = trial.score
    maximized = objective.maximized(score.tasks) if score else None
    if score is None or maximized is None:
        return trial
    gaps = [
        weight * (best - value) / spread
        for weight, value, (best, spread) in zip(weights.values(), maximized, scale, strict=True)
    ]
    worst = gaps.index(max(gaps))
    variance = sum(
        ((SUM_SHARE + (place == worst)) * weights[task] * objective.error(score.tasks, task) / scale[place][1]) ** 2
        for place, task in enumerate(objective.objectives)
    )
    total = 1.0 - gaps[worst] - SUM_SHARE * sum(gaps)
    said = Score(total, math.sqrt(variance), score.tasks, score.items, score.item_scores, score.replies)
    return replace(trial, score=said)
