"""Scores with weights rounded to the format of serving, beside those of the merges as they are."""

from collections.abc import Mapping
from dataclasses import dataclass

from llmevo.config import parse_logged
from llmevo.evaluation.racing import difference
from llmevo.evaluation.score import Score
from llmevo.evaluation.standard_errors import Questions, clusters
from llmevo.reports.text import with_error
from llmevo.run.log.state import ORIGIN, RunState
from llmevo.search.trial import Trial


@dataclass(frozen=True)
class ServedFinalist:
    """A finalist, with its scores on all its questions."""

    trial: Trial
    merged: Score
    served: Score
    change: float
    """Of the score, by the rounding."""
    error: float
    """The standard error of the change: paired where every question's score is known."""


def finalists(state: RunState) -> list[ServedFinalist]:
    """Return the finalists, the best as served first; empty before all of them are scored so."""
    if state.started is None or not state.served_finalists:
        return []
    counted = parse_logged(state.started.config, ORIGIN).counted
    weights, texts = {task: weight for task, (weight, _) in counted.items()}, state.started.texts
    asked = {task: [q for name in state.finals_sets for q in texts.get(name, {}).get(task, [])] for task in weights}
    found: list[ServedFinalist] = []
    for trial in state.served_finalists:
        merged, served = state.as_merged(trial), state.as_served(trial)
        error = error_of_difference(served, merged, weights, asked)
        found.append(ServedFinalist(trial, merged, served, served.total - merged.total, error))
    return sorted(found, key=lambda of: of.served.total, reverse=True)


@dataclass(frozen=True)
class ServedBest:
    """The best on the held-out questions, in both forms."""

    format: str
    searched: bool
    """Whether the search scored every candidate in the format."""
    merged: Score
    served: Score
    error: float
    """The standard error of the difference."""

    def __str__(self) -> str:
        change = with_error(self.served.total - self.merged.total, self.error, "+")
        every = "Every score is of weights rounded to" if self.searched else "Rounded to"
        return (
            f"{every} {self.format}, as it will be served{': the' if self.searched else ', the'} best scores"
            f" {with_error(self.served.total, self.served.stderr)} on the held-out questions, {change} against"
            f" {with_error(self.merged.total, self.merged.stderr)} as merged."
        )


def served_best(state: RunState) -> ServedBest | None:
    """Return the held-out scores of the best in both forms; None where there are none, or only one."""
    best = state.heldout.get("best")
    other = next((row for row in state.heldout.values() if row.kind in ("served", "plain")), None)
    if best is None or other is None or other.candidate != best.candidate:
        return None
    merged, served = (best, other) if other.kind == "served" else (other, best)
    weights = {task.name: task.weight for task in state.heldout_tasks}
    texts = state.started.texts.get("heldout", {}) if state.started else {}
    error = error_of_difference(served.read(), merged.read(), weights, texts)
    return ServedBest(served.quantized, other.kind == "plain", merged.read(), served.read(), error)


def error_of_difference(one: Score, other: Score, weights: Mapping[str, float], texts: Questions) -> float:
    """Return the standard error of the difference of two scores: paired where every question's score is known."""
    if weights and weights.keys() <= one.item_scores.keys() & other.item_scores.keys():
        return difference(one.item_scores, other.item_scores, weights, clusters(texts) if texts else None).error
    return (one.stderr**2 + other.stderr**2) ** 0.5
