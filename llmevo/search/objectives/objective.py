"""The objective of a config: the tasks with their weights, the constraints, and the Pareto front."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Self

import numpy as np

from llmevo.errors import nearest
from llmevo.evaluation.score import Metrics, error_of
from llmevo.search.trial import Trial

ROWS = ("parent", "uniform")  # in a bound: the best parent on the task, and the uniform merge, as measured in the run
WHOLE = re.compile(r"(.+?)\s*(>=|<=|>|<|==?|≥|≤)\s*(.+)")
BOUND = re.compile(r"([a-z_]+)?\s*([+-]?\s*(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)?", re.IGNORECASE)
FORM = "write `task >= 0.4`, `task >= parent - 0.01` or `task <= uniform`"
SIZES = ("layers", "parameters", "time")
"""Objectives beside the tasks, for layer paths: what a candidate has of them is known before it is scored."""
COUNT = "count"  # the metric of a size
ROUNDING = 1e-9  # means of equal answers may differ by so much


@dataclass(frozen=True)
class Constraint:
    """A bound for the counted metric of one search task."""

    text: str
    """As it was written, with single spaces."""
    task: str
    at_least: bool
    """True if the bound is a lower one."""
    row: str
    """`parent` or `uniform`, to which `offset` is added; empty for a number."""
    offset: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a line of `constraints:`. Raise ValueError that says how to write it."""
        whole = WHOLE.fullmatch(text.strip())
        if whole is None:
            raise ValueError(f"{text!r} compares nothing; {FORM}")
        task, sign, right = whole.groups()
        if sign not in (">=", "<=", "≥", "≤"):
            raise ValueError(f"{text!r}: {sign!r} is unknown; give >= or <=")
        bound = BOUND.fullmatch(right.strip())
        if bound is None or not any(bound.groups()):
            raise ValueError(f"{text!r}: {right!r} is no bound; {FORM}")
        row, number = bound[1] or "", (bound[2] or "0").replace(" ", "")
        if row and row not in ROWS:
            raise ValueError(
                f"{text!r}: {row!r} is unknown{nearest(row, ROWS)} (a bound is `parent`, `uniform` or a number:"
                " nothing else is scored on the search questions)"
            )
        if row and bound[2] and number[0] not in "+-":
            raise ValueError(f"{text!r}: {right!r} is no bound; {FORM}")
        if math.isinf(float(number)):
            raise ValueError(f"{text!r}: {number} is too large for a bound")
        return cls(" ".join(text.split()), task, sign in (">=", "≥"), row, float(number))

    def best(self, values: Iterable[float]) -> float:
        """Return the best of several parents' values."""
        return max(values) if self.at_least else min(values)

    def shortfall(self, value: float, bound: float) -> float:
        """Return the distance of a value from satisfying its bound, as a share of the bound unless that is 0, so that
        tasks of different scales can be added (Deb 2000, https://doi.org/10.1016/S0045-7825(99)00389-8, section 3).
        """
        missing = bound - value if self.at_least else value - bound
        return 0.0 if missing <= ROUNDING else missing / (abs(bound) or 1.0)


@dataclass(frozen=True)
class Objective:
    """The objective and the constraints of a config."""

    tasks: Mapping[str, tuple[float, str]] = field(default_factory=dict[str, tuple[float, str]])
    """Each search task's weight and the metric that counts."""
    constraints: tuple[Constraint, ...] = ()
    objective: Literal["sum", "pareto"] = "sum"
    """`sum`: Σ weight · metric. `pareto`: every task is an objective of its own; of its weight only the sign counts,
    and the weighted sum only selects the default result on the front."""
    seed: int = 0
    """Of the random weights of the objectives."""
    sizes: tuple[str, ...] = ()
    """Further objectives of `pareto`, of `SIZES`: less is better."""

    @cached_property
    def plain(self) -> bool:
        """True if the score alone ranks candidates."""
        return not self.constraints and self.objective == "sum"

    @property
    def pareto(self) -> bool:
        return self.objective == "pareto"

    @property
    def objectives(self) -> dict[str, float]:
        """Every objective of `pareto` with the sign of the better direction: the tasks, and the sizes."""
        signs = {task: math.copysign(1.0, weight) for task, (weight, _) in self.tasks.items()}
        return signs | dict.fromkeys(self.sizes, -1.0)

    @property
    def counts_sizes(self) -> bool:
        """Whether an objective or a constraint is of a size."""
        return bool(self.sizes) or any(self.is_size(constraint.task) for constraint in self.constraints)

    def is_size(self, name: str) -> bool:
        """Return whether this is the name of a size; a task of that name comes first."""
        return name in SIZES and name not in self.tasks

    def value(self, tasks: Metrics, task: str) -> float | None:
        """Return a task's counted metric, or a size; None where the score lacks it."""
        return tasks.get(task, {}).get(COUNT if self.is_size(task) else self.tasks[task][1])

    def error(self, tasks: Metrics, task: str) -> float:
        """Return the standard error of that; 0 where the score lacks it."""
        if self.is_size(task):
            return 0.0
        return tasks.get(task, {}).get(error_of(self.tasks[task][1]), 0.0)

    def maximized(self, tasks: Metrics) -> tuple[float, ...] | None:
        """Return the value of every objective, signed so that higher is better; None where the score lacks one."""
        values = [self.value(tasks, name) for name in self.objectives]
        if any(value is None for value in values):
            return None
        signed = zip(self.objectives.values(), values, strict=True)
        return tuple(sign * value for sign, value in signed if value is not None)


def front(trials: Sequence[Trial], objective: Objective) -> list[Trial]:
    """Return the trials that no other dominates, in the order given; all have scores on the same questions.

    Feasible trials dominate infeasible ones (Deb et al. 2002, https://doi.org/10.1109/4235.996017, section VI); without
    a feasible one the front is the trial with the least violation. Standard errors do not count.
    """
    feasible = [trial for trial in trials if trial.score and not trial.violation]
    if not feasible:
        scored = [trial for trial in trials if trial.score]
        return [min(scored, key=lambda trial: trial.violation)] if scored else []
    placed = [
        (trial, maximized)
        for trial in feasible
        if trial.score and (maximized := objective.maximized(trial.score.tasks)) is not None
    ]
    if not placed:
        return []
    points = np.array([maximized for _, maximized in placed])
    return [trial for trial, own in placed if not ((points >= own).all(axis=1) & (points > own).any(axis=1)).any()]
