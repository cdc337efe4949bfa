"""Scores with weights rounded to the format of serving, beside those of the merges as they are."""

from collections.abc import Mapping
from dataclasses import dataclass

from llmevo.evaluation.racing import difference
from llmevo.evaluation.score import Score
from llmevo.evaluation.standard_errors import Clusters
from llmevo.reports.text import with_error
from llmevo.run.log.events import HeldOut
from llmevo.run.log.state import RunState
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
    weights, clusters = state.question_weights(state.tasks, "search"), state.clusters(*state.finals_sets)
    found: list[ServedFinalist] = []
    for trial in state.served_finalists:
        merged, served = state.as_merged(trial), state.as_served(trial)
        error = error_of_difference(served, merged, weights, clusters)
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
    error = heldout_error(state, served, merged)
    return ServedBest(served.quantized, other.kind == "plain", merged.read(), served.read(), error)


def heldout_error(state: RunState, one: HeldOut, other: HeldOut) -> float:
    """Return the standard error of the difference of two held-out rows."""
    weights = state.question_weights(state.heldout_tasks, "heldout")
    return error_of_difference(one.read(), other.read(), weights, state.clusters("heldout"))


def error_of_difference(one: Score, other: Score, weights: Mapping[str, float], clusters: Clusters) -> float:
    """Return the standard error of the difference of two scores: paired where every question's score is known."""
    if weights and weights.keys() <= one.item_scores.keys() & other.item_scores.keys():
        return difference(one.item_scores, other.item_scores, weights, clusters).error
    return (one.stderr**2 + other.stderr**2) ** 0.5
