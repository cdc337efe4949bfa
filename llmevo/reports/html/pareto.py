"""The Pareto front: its candidates with their tasks, its hypervolume, and its picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from plotly import graph_objects as go  # pyright: ignore[reportMissingTypeStubs]

from llmevo.errors import plural
from llmevo.reports.comparison.chart import COLOURS
from llmevo.reports.html.analysis import Subject
from llmevo.reports.html.figures import GREY, Plot, add_points, escaped, plain, shown_origin
from llmevo.reports.text import objective_value
from llmevo.search.trial import Trial

BELOW = "The table below has their scores."


@dataclass(frozen=True)
class Place:
    """One candidate of the front."""

    id: int
    origin: str
    note: str
    best: bool
    """Whether it is exported by default."""
    values: Sequence[tuple[float, float]]
    """The value of every objective and its standard error."""


def places(subject: Subject) -> list[Place]:
    """Return the front, the highest weighted sum first; empty where the objective is a sum."""
    best = subject.state.best
    found: list[Place] = []
    for trial in subject.state.front:
        candidate = trial.candidate
        # The note of the surrogate is a score expected under one generation's weights.
        note = "" if candidate.origin == "gaussian" and candidate.expected is not None else candidate.note
        is_best = bool(best and best.candidate.id == candidate.id)
        found.append(Place(candidate.id, shown_origin(candidate.origin), note, is_best, _values(subject, trial)))
    return found


def _values(subject: Subject, trial: Trial) -> list[tuple[float, float]]:
    """NaN where a score lacks a task."""
    objective, metrics = subject.state.objective, trial.score.tasks if trial.score else {}
    values = [objective.value(metrics, name) for name in objective.objectives]
    errors = [objective.error(metrics, name) for name in objective.objectives]
    return [(math.nan if value is None else value, error) for value, error in zip(values, errors, strict=True)]


@dataclass(frozen=True)
class Covered:
    """Hypervolumes (Zitzler and Thiele 1999, https://doi.org/10.1109/4235.797969), counted from the worst of the start
    rows at every task, 0, to the best of them, 1: a candidate as good as the best of them everywhere covers 1.
    """

    start: float
    """By the start rows: the parents, the uniform merge, coefficients and the user's own."""
    front: float


def covered(subject: Subject) -> Covered | None:
    """Return None where the objective is a sum, where no candidate satisfies the constraints, and where all start rows
    are equal at a task, for then there is no scale.
    """
    state = subject.state
    start = [trial for trial in state.asked_all if trial.candidate.generation == 0]

    def maximized(trials: Sequence[Trial]) -> NDArray[np.float64]:
        found = [state.objective.maximized(trial.score.tasks) for trial in trials if trial.score]
        return np.array([each for each in found if each is not None]).reshape(-1, len(state.objective.objectives))

    if not state.front or state.unmet:
        return None
    rows = maximized(start)
    if not len(rows) or not (spread := np.ptp(rows, axis=0)).all():
        return None
    low = rows.min(axis=0)
    kept = (maximized([trial for trial in start if not trial.violation]) - low) / spread
    found = (maximized(state.front) - low) / spread
    return Covered(hypervolume(kept), hypervolume(np.vstack([kept, found])))


def hypervolume(points: NDArray[np.float64]) -> float:
    """Return the volume between the origin and `points` (one a row, higher is better), exactly.

    Each point adds its box less the part that later points cover too (While et al. 2012, the WFG algorithm,
    https://doi.org/10.1109/TEVC.2010.2077298).
    """
    points = np.unique(points[(points > 0).all(axis=1)], axis=0)[::-1]
    dominated = [((points >= own).all(axis=1) & (points > own).any(axis=1)).any() for own in points]
    points = points[~np.array(dominated, dtype=bool)]
    return sum(
        (float(own.prod()) - hypervolume(np.minimum(own, points[place:])) for place, own in enumerate(points, start=1)),
        0.0,
    )


def front(subject: Subject) -> Plot | None:
    """Draw all candidates of two tasks with the front joined, or of more tasks a line for each of the front.

    None where the objective is a sum.
    """
    found = places(subject)
    if not found:
        return None
    return _two(subject, found) if len(subject.state.objective.objectives) == 2 else _many(subject, found)


def _two(subject: Subject, found: Sequence[Place]) -> Plot:
    """Draw one task against the other."""
    figure, shown = go.Figure(), {place.id for place in found}
    others = [trial for trial in subject.scored if trial.candidate.id not in shown]
    rest: list[tuple[float, float, str]] = []
    for trial in others:
        (x, _), (y, _) = _values(subject, trial)
        rest.append((x, y, f"#{trial.candidate.id}{f', {escaped(trial.reason)}' if trial.violation else ''}"))
    marker = {"color": GREY, "size": 6, "opacity": 0.6}
    add_points(figure, "not on the front", rest, marker, "%{text}: %{x:.3f}, %{y:.3f}")
    joined = sorted(found, key=lambda place: place.values[0][0])
    figure.add_scatter(
        x=[place.values[0][0] for place in joined],
        y=[place.values[1][0] for place in joined],
        error_x={"type": "data", "array": [place.values[0][1] for place in joined], "thickness": 1},
        error_y={"type": "data", "array": [place.values[1][1] for place in joined], "thickness": 1},
        mode="lines+markers+text",
        name="front",
        line={"color": COLOURS[1], "width": 1},
        marker={"color": COLOURS[1], "symbol": ["star" if place.best else "circle" for place in joined], "size": 10},
        text=[f"#{place.id}" for place in joined],
        textposition="top right",
        hovertemplate="%{text}: %{x:.3f}, %{y:.3f}<extra></extra>",
    )
    names = _names(subject)
    figure.update_layout(xaxis_title=names[0], yaxis_title=names[1], hovermode="closest")
    return plain(figure, f"{plural(len(found), 'candidate')} of the front and {len(rest)} others. {BELOW}")


def _many(subject: Subject, found: Sequence[Place]) -> Plot:
    """Draw parallel coordinates: every task from the worst to the best of the front, so that scales do not matter."""
    figure, objective = go.Figure(), subject.state.objective
    values = np.array([[value for value, _ in place.values] for place in found])
    values *= [*objective.objectives.values()]
    low, spread = values.min(axis=0), np.ptp(values, axis=0)
    shares = np.where(spread > 0, (values - low) / np.where(spread > 0, spread, 1.0), 0.5)
    for number, place in enumerate(found):
        figure.add_scatter(
            x=_names(subject),
            y=shares[number].tolist(),
            mode="lines+markers",
            name=f"#{place.id}{' (best)' if place.best else ''}",
            line={"color": COLOURS[number % len(COLOURS)], "width": 4 if place.best else 1.5},
            text=[
                objective_value(objective, name, value, error)
                for name, (value, error) in zip(objective.objectives, place.values, strict=True)
            ],
            hovertemplate=f"#{place.id}, %{{x}}: %{{text}}<extra></extra>",
        )
    figure.update_layout(yaxis_title="from the front's worst to its best", hovermode="closest")
    return plain(figure, f"{plural(len(found), 'candidate')} of the front, a line each. {BELOW}")


def _names(subject: Subject) -> list[str]:
    """The shown names of the objectives, for a figure."""
    return [escaped(name) for name in names(subject).values()]


def names(subject: Subject) -> dict[str, str]:
    """Return {objective: its shown name}: the tasks, and the sizes of layer paths."""
    return {**subject.tasks, **{name: name for name in subject.state.objective.sizes}}
