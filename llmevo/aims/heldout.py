"""Whether the constraints hold on the held-out questions too, in words."""

from collections.abc import Mapping
from dataclasses import dataclass

from llmevo.aims.keeping import Keeping
from llmevo.trial import Score


@dataclass(frozen=True)
class Held:
    """One constraint on the held-out questions of its task, for the best."""

    constraint: str
    task: str
    """The held-out task; empty where none goes with the constraint's."""
    value: float = 0.0
    bound: float = 0.0
    holds: bool | None = None
    """None where it was not asked there."""

    def __str__(self) -> str:
        if self.holds is None:
            return f"{self.constraint}: not asked on held-out questions"
        verdict = "holds" if self.holds else "does not hold"
        return f"{self.constraint} {verdict} on held-out questions: {self.value:.3f} against {self.bound:.3f}"


def held(keeping: Keeping, tasks: Mapping[str, tuple[str, str]], rows: Mapping[int, Score], best: Score) -> list[Held]:
    """Each constraint, for the best's held-out score.

    `tasks`: {search task: (held-out task, its metric)} of those that have one. `rows`: the held-out scores by
    candidate: a bound is what its own row, the same as in the search, scores there.
    """
    found: list[Held] = []
    for constraint in keeping.aims.constraints:
        name, metric = tasks.get(constraint.task, ("", ""))
        row = keeping.row(constraint) if constraint.row else None
        reference = rows.get(row.candidate.id) if row else None
        own = best.tasks.get(name, {}).get(metric)
        base = reference.tasks.get(name, {}).get(metric) if reference else None if constraint.row else 0.0
        if own is None or base is None:
            found.append(Held(constraint.text, name))
            continue
        bound = base + constraint.offset
        found.append(Held(constraint.text, name, own, bound, not constraint.shortfall(own, bound)))
    return found
