"""The Pareto front: where its candidates stand at every task, as a picture and as a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plotly import graph_objects as go  # pyright: ignore[reportMissingTypeStubs]

from llmevo.drawing import COLOURS
from llmevo.report.figures import GREY, Plot, origin, plain, text_of
from llmevo.report.subject import Subject
from llmevo.trial import Trial


@dataclass(frozen=True)
class Place:
    """One candidate of the front."""

    id: int
    origin: str
    note: str
    best: bool
    """Whether it is the one that is handed over unless another is asked for."""
    values: Sequence[tuple[float, float]]
    """The counted metric of every task and its standard error."""


def places(subject: Subject) -> list[Place]:
    """The front, the highest weighted sum first; empty where the objective is a sum."""
    best = subject.state.best
    return [
        Place(
            trial.candidate.id,
            origin(trial.candidate.origin),
            trial.candidate.note,
            bool(best and best.candidate.id == trial.candidate.id),
            _values(subject, trial),
        )
        for trial in subject.state.front
    ]


def front(subject: Subject) -> Plot | None:
    """Of two tasks, all candidates with the front joined; of more, a line across the tasks for each of the front.

    None where the objective is a sum.
    """
    found = places(subject)
    if not found:
        return None
    return _two(subject, found) if len(subject.tasks) == 2 else _many(subject, found)


def _values(subject: Subject, trial: Trial) -> list[tuple[float, float]]:
    """NaN where a score lacks a task."""
    aims, metrics = subject.state.aims, trial.score.tasks if trial.score else {}
    values = [aims.value(metrics, task) for task in aims.tasks]
    errors = [aims.error(metrics, task) for task in aims.tasks]
    return [(math.nan if value is None else value, error) for value, error in zip(values, errors, strict=True)]


def _two(subject: Subject, found: Sequence[Place]) -> Plot:
    """The one task against the other."""
    figure, shown = go.Figure(), {place.id for place in found}
    others = [trial for trial in subject.scored if trial.candidate.id not in shown]
    rest = [[value for value, _ in _values(subject, trial)] for trial in others]
    figure.add_scatter(
        x=[values[0] for values in rest],
        y=[values[1] for values in rest],
        mode="markers",
        name="not on the front",
        marker={"color": GREY, "size": 6, "opacity": 0.6},
        text=[_told(trial) for trial in others],
        hovertemplate="%{text}: %{x:.3f}, %{y:.3f}<extra></extra>",
    )
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
    names = [text_of(name) for name in subject.tasks.values()]
    figure.update_layout(xaxis_title=names[0], yaxis_title=names[1], hovermode="closest")
    return plain(figure)


def _told(trial: Trial) -> str:
    return f"#{trial.candidate.id}" + (f", {text_of(trial.reason)}" if trial.violation else "")


def _many(subject: Subject, found: Sequence[Place]) -> Plot:
    """Parallel coordinates: every task from the worst to the best of the front, so that scales do not matter."""
    figure = go.Figure()
    columns = [[place.values[task][0] for place in found] for task in range(len(subject.tasks))]
    lows, highs = [min(column) for column in columns], [max(column) for column in columns]
    names = [text_of(name) for name in subject.tasks.values()]
    signs = [math.copysign(1.0, weight) for weight, _ in subject.state.aims.tasks.values()]
    for number, place in enumerate(found):
        shares = [
            0.5 if high == low else (value - low) / (high - low) if sign > 0 else (high - value) / (high - low)
            for (value, _), low, high, sign in zip(place.values, lows, highs, signs, strict=True)
        ]
        figure.add_scatter(
            x=names,
            y=shares,
            mode="lines+markers",
            name=f"#{place.id}{' (best)' if place.best else ''}",
            line={"color": COLOURS[number % len(COLOURS)], "width": 4 if place.best else 1.5},
            text=[f"{value:.3f} ± {error:.3f}" for value, error in place.values],
            hovertemplate=f"#{place.id}, %{{x}}: %{{text}}<extra></extra>",
        )
    figure.update_layout(yaxis_title="from the front's worst to its best", hovermode="closest")
    return plain(figure)
