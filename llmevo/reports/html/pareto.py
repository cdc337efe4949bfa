"""The Pareto front: where its candidates stand at every task, as a picture and as a table."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plotly import graph_objects as go  # pyright: ignore[reportMissingTypeStubs]

from llmevo.reports.comparison.chart import COLOURS
from llmevo.reports.html.figures import GREY, Plot, origin, plain, text_of
from llmevo.reports.html.subject import Subject
from llmevo.search.trial import Candidate, Trial


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
            _note(trial.candidate),
            bool(best and best.candidate.id == trial.candidate.id),
            _values(subject, trial),
        )
        for trial in subject.state.front
    ]


def _note(candidate: Candidate) -> str:
    """Empty for the surrogate's, which is a prediction under one generation's weights and no score."""
    return "" if candidate.origin == "gaussian" and candidate.expected is not None else candidate.note


def front(subject: Subject) -> Plot | None:
    """Of two tasks, all candidates with the front joined; of more, a line across the tasks for each of the front.

    None where the objective is a sum.
    """
    found = places(subject)
    if not found:
        return None
    return _two(subject, found) if len(subject.tasks) == 2 else _many(subject, found)


@dataclass(frozen=True)
class Covered:
    """Hypervolumes (Zitzler and Thiele 1999, https://doi.org/10.1109/4235.797969): what candidates dominate of the
    tasks' space. It is counted from the worst of the start rows at every task, 0, to the best of them, 1: a candidate
    that is as good as the best of them everywhere covers 1, a better one more.
    """

    start: float
    """By the start rows: the parents, the uniform merge, other weights for all models and the user's own."""
    front: float


def covered(subject: Subject) -> Covered | None:
    """None where the objective is a sum, where nobody keeps the constraints, and where all start rows are equal at a
    task, for then there is no scale.
    """
    state = subject.state
    start = [trial for trial in state.asked_all if trial.candidate.generation == 0]
    places = [state.aims.heights(trial.score.tasks) for trial in start if trial.score]
    columns = [*zip(*(place for place in places if place is not None), strict=True)]
    scale = [(min(column), max(column) - min(column)) for column in columns]
    if not state.front or state.unmet or not all(spread for _, spread in scale):
        return None
    points = [
        [(value - low) / spread for value, (low, spread) in zip(heights, scale, strict=True)]
        for trial in (*(trial for trial in start if not trial.violation), *state.front)
        if trial.score and (heights := state.aims.heights(trial.score.tasks)) is not None
    ]
    volumes = _hypervolumes(points)
    before = len(points) - len(state.front)
    return Covered(volumes[before - 1] if before else 0.0, volumes[-1])


def _hypervolumes(points: Sequence[Sequence[float]]) -> list[float]:
    """Of the first point, the first two, and so on, above 0."""
    import optuna  # slow to import

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=[optuna.study.StudyDirection.MAXIMIZE for _ in points[0]])
    study.add_trials([optuna.create_trial(values=[*point]) for point in points])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        figure: Any = optuna.visualization.plot_hypervolume_history(study, [0.0] * len(points[0]))
    return [float(value) for value in figure.data[0].y]


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
