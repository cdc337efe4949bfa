"""Constraint checking: on the search questions, with those of the selection, and on held-out questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from llmevo.evaluation.score import Score
from llmevo.evaluation.tasks.task import short, stem
from llmevo.search.objectives.objective import Constraint, Objective
from llmevo.search.trial import Trial


@dataclass(frozen=True)
class ConstraintChecker:
    """The constraints with all trials; a bound that names a start row is that row's value on the same questions."""

    objective: Objective
    trials: Mapping[int, Trial]
    selection: Mapping[int, Score]
    """The finalists' scores on the selection questions."""

    def judged(self, trial: Trial) -> Trial:
        """Return the trial with its violation, the sum of its shortfalls, and with the reason in words.

        Of a stopped trial it is an estimate from the questions that it was asked. A constraint whose row has no score
        does not count.
        """
        if trial.score is None:
            return trial
        violation, missed = 0.0, list[str]()
        for constraint in self.objective.constraints:
            value, bound = self._compared(constraint, trial, trial.score)
            short = 0.0 if value is None or bound is None else constraint.shortfall(value, bound)
            if short:
                violation += short
                against = f" against {bound:.4g}" if constraint.row else ""
                missed.append(f"{constraint.text} ({value:.4g}{against})")
        return replace(trial, violation=violation, reason=f"violates {'; '.join(missed)}" if missed else "")

    def row(self, constraint: Constraint) -> Trial | None:
        """Return the start row that a constraint's bound is counted from; the earlier one of equals."""
        rows = {
            number: value
            for number, trial in self.trials.items()
            if trial.candidate.origin == constraint.row and trial.score
            if (value := self.objective.value(trial.score.tasks, constraint.task)) is not None
        }
        if not rows:
            return None
        best = constraint.best(rows.values())
        return self.trials[next(number for number, value in rows.items() if value == best)]

    def _compared(self, constraint: Constraint, trial: Trial, score: Score) -> tuple[float | None, float | None]:
        """A trial's value and its bound on the same questions."""
        task, number = constraint.task, trial.candidate.id
        value = self.objective.value(score.tasks, task)
        if not constraint.row:
            return self._pooled(number, task, value), constraint.offset
        row = self.row(constraint)
        if row is None or row.score is None:
            return value, None
        reference = self.objective.value(row.score.tasks, task)
        asked, all_asked = score.item_scores.get(task, ()), row.score.item_scores.get(task, ())
        if 0 < len(asked) < len(all_asked):  # it was stopped
            reference = sum(all_asked[: len(asked)]) / len(asked)
        elif number in self.selection and row.candidate.id in self.selection:
            value = self._pooled(number, task, value)
            reference = self._pooled(row.candidate.id, task, reference)
        return value, None if reference is None else reference + constraint.offset

    def _pooled(self, number: int, task: str, value: float | None) -> float | None:
        """The metric on search and selection questions together, as far as there are both."""
        if number not in self.selection or value is None:
            return value
        first, second = self.trials[number].score, self.selection[number]
        other = self.objective.value(second.tasks, task)
        if first is None or other is None:
            return value
        one, two = (len(score.item_scores.get(task, ())) for score in (first, second))
        if not (one and two):  # of a metric that no single question has
            one, two = first.items, second.items
        return (value * one + other * two) / (one + two)


@dataclass(frozen=True)
class HeldoutConstraint:
    """One constraint, checked for the best on the held-out questions of its task."""

    constraint: str
    task: str
    """The held-out task; empty where none matches the constraint's."""
    value: float = 0.0
    bound: float = 0.0
    holds: bool | None = None
    """None without a held-out score."""
    row: str = ""
    """The start row that the bound is counted from; empty where the bound is a number."""

    def __str__(self) -> str:
        if self.holds is None:
            return f"{self.constraint}: not asked on held-out questions"
        verdict = "holds" if self.holds else "does not hold"
        of = f" of {self.row}, the best of these in the search" if self.row else ""
        return f"{self.constraint} {verdict} on held-out questions: {self.value:.3f} against {self.bound:.3f}{of}"


def check_heldout(
    checker: ConstraintChecker, tasks: Mapping[str, tuple[str, str]], rows: Mapping[int, Score], best: Score
) -> list[HeldoutConstraint]:
    """Return each constraint, checked for the best's held-out score.

    `tasks` is {search task: (held-out task, its metric)}, `rows` the held-out scores by candidate: a bound is the
    held-out score of the start row that it has in the search.
    """
    found: list[HeldoutConstraint] = []
    for constraint in checker.objective.constraints:
        if checker.objective.is_size(constraint.task):  # the same for all questions
            continue
        name, metric = tasks.get(constraint.task, ("", ""))
        row = checker.row(constraint) if constraint.row else None
        reference = rows.get(row.candidate.id) if row else None
        own = best.tasks.get(name, {}).get(metric)
        base = reference.tasks.get(name, {}).get(metric) if reference else None if constraint.row else 0.0
        if own is None or base is None:
            found.append(HeldoutConstraint(constraint.text, name))
            continue
        bound = base + constraint.offset
        named = row.candidate.note if row and constraint.row == "parent" else ""
        found.append(HeldoutConstraint(constraint.text, name, own, bound, not constraint.shortfall(own, bound), named))
    return found


def paired(searched: Sequence[str], heldout: Sequence[str]) -> dict[str, str]:
    """Return {search task: its held-out task}: the only two of their lists; or of the same name or short name; or of
    the same name but for the words for a set (`arc_easy_train` and `arc_easy`, `sums` and `sums_heldout`).
    """
    if len(searched) == len(heldout) == 1:
        return {searched[0]: heldout[0]}
    called = {**dict(zip(short(heldout), heldout, strict=True)), **{name: name for name in heldout}}
    names = {name: name if name in called else shown for name, shown in zip(searched, short(searched), strict=True)}
    found = {name: called[shown] for name, shown in names.items() if shown in called}
    stems = {stem(other): other for other in reversed(heldout) if other not in found.values()}
    return {**{name: stems[stem(name)] for name in searched if stem(name) in stems}, **found}
