"""What is searched for: the sum of the tasks or each of them for itself, and what must be kept."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llmevo.aims.constraint import Constraint
from llmevo.trial import Metrics


@dataclass(frozen=True)
class Aims:
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
