"""One line of `constraints:`: what a merge must not lose."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

from llmevo.errors import nearest
from llmevo.evaluation.score import Metrics

ROWS = ("parent", "uniform")
"""The words for a bound: the best parent on the task, and the uniform merge, as this run has measured them."""


WHOLE = re.compile(r"(.+?)\s*(>=|<=|>|<|==?|≥|≤)\s*(.+)")


BOUND = re.compile(r"([a-z_]+)?\s*([+-]?\s*(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)?", re.IGNORECASE)


FORM = "write `task >= 0.4`, `task >= parent - 0.01` or `task <= uniform`"


ROUNDING = 1e-9
"""Means of equal answers may differ by so much."""


@dataclass(frozen=True)
class Constraint:
    """A bound for the counted metric of one search task."""

    text: str
    """As it was written, spaces apart."""
    task: str
    at_least: bool
    """Whether the metric is to stay above the bound; else below it."""
    row: str
    """`parent` or `uniform`: what `offset` is counted from; empty where that is 0."""
    offset: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError that says what is wrong and how to write it."""
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
        return cls(" ".join(text.split()), task, sign in (">=", "≥"), row, float(number))

    def best(self, values: Iterable[float]) -> float:
        """Of several parents' values the one to count from: the highest where the metric is to be high."""
        return max(values) if self.at_least else min(values)

    def shortfall(self, value: float, bound: float) -> float:
        """By how much a value misses a bound, as a share of the bound, so that tasks of different scales can be added
        (Deb 2000, https://doi.org/10.1016/S0045-7825(99)00389-8, section 3); of a bound of 0 as it is. 0: not at all.
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
    """`sum`: Σ weight · metric. `pareto`: every task is an aim of its own; of its weight only the sign counts, and the
    weighted sum only says which of the front is handed over unless another one is asked for."""
    seed: int = 0
    """What the changing emphasis on the aims follows from."""

    @property
    def plain(self) -> bool:
        """Whether the score alone ranks candidates."""
        return not self.constraints and self.objective == "sum"

    @property
    def pareto(self) -> bool:
        return self.objective == "pareto"

    def value(self, tasks: Metrics, task: str) -> float | None:
        """A task's counted metric; None where the score lacks it."""
        return tasks.get(task, {}).get(self.tasks[task][1])

    def error(self, tasks: Metrics, task: str) -> float:
        """The standard error of that; 0 where the score lacks it."""
        metric, _, filter_ = self.tasks[task][1].partition(",")
        return tasks.get(task, {}).get(f"{metric}_stderr,{filter_}", 0.0)

    def heights(self, tasks: Metrics) -> tuple[float, ...] | None:
        """All counted metrics, turned so that higher is better; None where the score lacks one."""
        values = [self.value(tasks, task) for task in self.tasks]
        signs = [math.copysign(1.0, weight) for weight, _ in self.tasks.values()]
        if any(value is None for value in values):
            return None
        return tuple(sign * value for sign, value in zip(signs, values, strict=True) if value is not None)
