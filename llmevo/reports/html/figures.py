"""The figures of the page, as plain values for Plotly. Colours of paper, text and heat maps are the page's own."""

import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from plotly import graph_objects as go  # pyright: ignore[reportMissingTypeStubs]

from llmevo.errors import plural
from llmevo.reports.comparison.chart import COLOURS
from llmevo.reports.comparison.statistics import best_so_far
from llmevo.reports.html.analysis import Subject, TaskEffects, layers_of
from llmevo.reports.html.predictions import LLM, STATISTICS, Prediction
from llmevo.reports.text import with_error
from llmevo.run.log.storage import ROUTING
from llmevo.search.prompts.names import shortened
from llmevo.search.trial import Trial

GREY = "#888888"
"""Of failures, on white and on black."""
ORIGINS = {
    "gaussian": (COLOURS[0], "circle"),
    "llm": (COLOURS[1], "diamond"),
    "parent": (COLOURS[2], "square"),
    "uniform": (COLOURS[3], "triangle-up"),
    "coefficient": (COLOURS[6], "triangle-down"),
    "user": (COLOURS[4], "star"),
    "random": (COLOURS[5], "circle-open"),
}
"""A colour and a shape each, so that colour alone distinguishes nothing; the samples of other optimizers share one."""
NAME = 22
"""Characters of a name at a heat map."""
CROWDED = 6
"""Columns above which their names are vertical."""
HOVER = 160
"""Characters of a note."""
TOLD = 12
"""Cells of a heat map that its text alternative names."""

Plot = dict[str, Any]


def plain(figure: Any, alt: str = "") -> Plot:
    """Return a figure in plain values, without a template: the page has one for each theme. `alt` says in words what it
    shows, for those who cannot see it.
    """
    values: Plot = figure.to_plotly_json()
    values["layout"].pop("template", None)
    return {**values, "alt": alt}


def shown_origin(name: str) -> str:
    """Return an origin in plain words."""
    return {"gaussian": "numeric", "llm": "LLM", "user": "your own"}.get(name, name)


def escaped(text: str) -> str:
    """Return a text, cut, as Plotly shows it: its own bit of HTML must not be taken from a note."""
    cut = text if len(text) <= HOVER else text[: HOVER - 1] + "…"
    return cut.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def search(subject: Subject) -> Plot:
    """Draw every candidate by origin, and the best so far."""
    trials = [*subject.state.trials.values()]
    figure = go.Figure()
    best = best_so_far([trial.score.total if trial.score and not trial.violation else None for trial in trials])
    _add_line(figure, [*range(1, len(best) + 1)], best, "best so far", {"shape": "hv", "width": 2})
    for name in dict.fromkeys([*ORIGINS, *(trial.candidate.origin for trial in trials)]):
        own = [(place, t) for place, t in enumerate(trials, start=1) if t.candidate.origin == name and t.score]
        if own:
            colour, symbol = ORIGINS.get(name, (GREY, "cross"))
            marker = {"color": colour, "symbol": symbol, "size": 8 if len(trials) < 200 else 6}
            points = [(place, t.score.total, _hover(t)) for place, t in own if t.score]
            add_points(figure, escaped(shown_origin(name)), points, marker, "%{text}")
    if failed := [(place, trial) for place, trial in enumerate(trials, start=1) if not trial.score]:
        values = [trial.score.total for trial in trials if trial.score] or [0.0]
        below = min(values) - 0.06 * (max(values) - min(values))
        marker = {"color": GREY, "symbol": "x-thin", "size": 8, "line": {"color": GREY, "width": 2}}
        points = [(place, below, f"#{t.candidate.id} failed: {escaped(t.reason)}") for place, t in failed]
        add_points(figure, "failed", points, marker, "%{text}")
    figure.update_layout(xaxis_title="evaluations", yaxis_title="search score", hovermode="closest")
    return plain(figure, _told_search(trials, best))


def _told_search(trials: Sequence[Trial], best: Sequence[float | None]) -> str:
    known = [(place, value) for place, value in enumerate(best, start=1) if value is not None]
    if not known:
        return f"{plural(len(trials), 'candidate')}, none with a score yet."
    (first, start), end = known[0], known[-1][1]
    reached = next(place for place, value in known if value == end)
    failed = sum(trial.score is None for trial in trials)
    return (
        f"The best score of {plural(len(trials), 'candidate')} so far rises from {start:.3f} at evaluation {first} to"
        f" {end:.3f} at evaluation {reached}; {failed} failed. The table of candidates has all scores."
    )


def add_points(
    figure: Any, name: str, points: Sequence[tuple[float, float, str]], marker: dict[str, Any], hover: str
) -> None:
    """Add points, given as x, y and text."""
    x, y, text = ([point[part] for point in points] for part in range(3))
    template = f"{hover}<extra></extra>"
    figure.add_scatter(x=x, y=y, mode="markers", name=name, marker=marker, text=text, hovertemplate=template)


def _add_line(figure: Any, x: Sequence[float], y: Sequence[float | None], name: str, line: dict[str, Any]) -> None:
    """Add a line in the colour of the page's text."""
    figure.add_scatter(x=x, y=y, mode="lines", name=name, line=line, meta="ink", hoverinfo="skip")


def _hover(trial: Trial) -> str:
    assert trial.score is not None
    candidate = trial.candidate
    notes = (candidate.note, trial.reason if trial.violation else "")
    head = f"#{candidate.id}, generation {candidate.generation}"
    return "<br>".join([head, with_error(trial.score.total, trial.score.stderr), *map(escaped, filter(None, notes))])


def step_size(subject: Subject) -> Plot | None:
    """Draw the step size over the generations; None for an optimizer without one."""
    told = [(event.generation, event.sigma) for event in subject.state.told if event.sigma is not None]
    return _line(told, "step size (share of a gene's range)", COLOURS[0]) if told else None


def trust(subject: Subject) -> Plot | None:
    """Draw the share of the evaluations that the LLM has earned; None without an LLM."""
    told = [(event.generation, event.trust) for event in subject.state.told if event.trust is not None]
    return _line(told, "the LLM's share", COLOURS[1]) if told else None


def _line(told: Sequence[tuple[int, float]], title: str, colour: str) -> Plot:
    figure = go.Figure()
    figure.add_scatter(
        x=[generation for generation, _ in told],
        y=[value for _, value in told],
        mode="lines+markers" if len(told) < 60 else "lines",
        line={"color": colour},
        hovertemplate="generation %{x}: %{y:.3f}<extra></extra>",
    )
    figure.update_layout(xaxis_title="generation", yaxis_title=title, yaxis_rangemode="tozero", showlegend=False)
    (first, start), (last, end) = told[0], told[-1]
    return plain(figure, f"From {start:.3f} in generation {first} to {end:.3f} in generation {last}.")


def calibration(found: Sequence[Prediction]) -> Plot | None:
    """Draw predicted against achieved scores; None without predictions."""
    if not found:
        return None
    figure = go.Figure()
    values = [value for prediction in found for value in (prediction.predicted, prediction.achieved)]
    ends = [min(values), max(values)]
    _add_line(figure, ends, ends, "as predicted", {"dash": "dot", "width": 1})
    for by, (colour, symbol) in ((STATISTICS, ORIGINS["gaussian"]), (LLM, ORIGINS["llm"])):
        points = [(p.predicted, p.achieved, f"#{p.candidate}") for p in found if p.by == by]
        if points:
            marker = {"color": colour, "symbol": symbol, "size": 8}
            add_points(figure, by, points, marker, "%{text}: predicted %{x:.3f}, achieved %{y:.3f}")
    figure.update_layout(xaxis_title="predicted score", yaxis_title="achieved score", hovermode="closest")
    above = sum(prediction.achieved > prediction.predicted for prediction in found)
    return plain(figure, f"{plural(len(found), 'prediction')}, of which {above} were exceeded.")


def recipe(subject: Subject) -> Plot | None:
    """Draw the best recipe: slice × model × parameter. None before there is one."""
    best = subject.state.best
    if best is None:
        return None
    genes, space = best.candidate.genes, subject.space
    inside = space.contains(genes)
    active = dict(zip((gene.name for gene in space.genes), space.active(genes), strict=True)) if inside else {}
    cells = {
        gene.name: (genes[gene.name], f"{genes[gene.name]:.2f}", f"bounds {gene.low:g} to {gene.high:g}")
        for gene in space.genes
        if not gene.choices and active.get(gene.name)
    }
    told = [f"{_where(subject, name)} {text}" for name, (_, text, _) in cells.items()]
    return _heat(subject, cells, "sequential", "value", _listed(told)) if cells else None


def effect(subject: Subject, of: TaskEffects) -> Plot | None:
    """Draw every gene's effect on a task, coloured by its strength. None without known effects."""
    cells = {
        gene.gene.name: (
            max(-4.0, min(4.0, gene.strength)),
            f"{gene.effect:+.2f}" if abs(gene.effect) < 10 else f"{gene.effect:+.2g}",
            f"{gene.effect:+.3g} ± {gene.stderr:.2g} points from lowest to highest<br>best recipe: {gene.best:.3g},"
            f" worth {gene.earned:+.3g} ± {gene.earned_stderr:.2g} against uniform",
        )
        for gene in of.genes
    }
    strongest = sorted(cells.items(), key=lambda cell: -abs(cell[1][0]))
    told = _listed([f"{_where(subject, name)} {text}" for name, (_, text, _) in strongest])
    return _heat(subject, cells, "diverging", "effect / its<br>std. error", f"The strongest: {told}") if cells else None


def _where(subject: Subject, gene: str) -> str:
    """Return the model, parameter and slice of a gene in words."""
    own = next(each for each in subject.space.genes if each.name == gene)
    return f"{own.model or 'all models'} {own.parameter} in {layers_of(own)}"


def _listed(told: Sequence[str]) -> str:
    """Return the first entries of a figure in words."""
    return "; ".join(told[:TOLD]) + (f"; and {len(told) - TOLD} more." if len(told) > TOLD else ".")


def routing(subject: Subject) -> Plot | None:
    """Draw the share of each expert by task and layer in the best mixture; None for other runs."""
    try:
        given = json.loads((subject.folder / ROUTING).read_text())
    except (OSError, ValueError):
        return None
    names = shortened([*dict.fromkeys(given["experts"])], NAME)
    own = [names[expert] for expert in given["experts"]]
    if len(names) < len(own):  # of a parent, all of whose experts are copies
        own = [f"{name} ({place})" for place, name in enumerate(own, start=1)]
    tasks = {**subject.tasks, **{task: name for task, (name, _) in subject.heldout_tasks.items()}}
    shares: dict[str, list[list[float]]] = given["shares"]
    rows = {
        f"{tasks.get(task, task)}: {name}": [layer[place] for layer in table]
        for task, table in shares.items()
        for place, name in enumerate(own)
    }
    figure = go.Figure()
    figure.add_heatmap(
        y=[escaped(row) for row in rows],
        z=[*rows.values()],
        text=[[f"{share:.1f}".lstrip("0") for share in row] for row in rows.values()],
        texttemplate="%{text}",
        hovertemplate="%{y}, layer %{x}: %{z:.2f}<extra></extra>",
        xgap=1,
        ygap=1,
        zmin=0,
        zmax=1,
        meta="sequential",
        colorbar={"title": {"text": "share", "side": "top"}, "thickness": 12, "outlinewidth": 0},
    )
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(title="layer", showgrid=False)
    layers = len(next(iter(rows.values())))
    figure.update_layout(height=130 + 20 * len(rows), meta={"columns": layers, "label": max(map(len, rows))})
    told = [_mostly(tasks.get(task, task), own, table) for task, table in shares.items()]
    return plain(figure, _listed(told))


def _mostly(task: str, experts: Sequence[str], table: Sequence[Sequence[float]]) -> str:
    """Return in words which expert has the largest share of a task, on average over the layers."""
    share, expert = max((fmean(own), expert) for own, expert in zip(zip(*table, strict=True), experts, strict=True))
    return f"{task}: mostly {expert}, {share:.2f}"


def _heat(subject: Subject, cells: dict[str, tuple[float, str, str]], scale: str, title: str, alt: str) -> Plot:
    """Draw slices as rows, models and their parameters as columns; `cells` holds value, text, hover of each gene."""
    space = subject.space
    genes = [gene for gene in space.genes if not gene.choices]
    names = shortened([*dict.fromkeys(gene.model or "all models" for gene in genes)], NAME)
    many = len({gene.parameter for gene in genes}) > 1

    def row(gene: Any) -> str:
        label = "all layers" if gene.slice in (None, "all") else f"layers {gene.slice}"
        return f"{label} {gene.filter or 'other'}" if len(space.filters) > 1 else label

    def column(gene: Any) -> str:
        model = names[gene.model or "all models"]
        return escaped(f"{model} {gene.parameter}" if many else model)

    rows, columns = ([*dict.fromkeys(map(label, genes))] for label in (row, column))
    empty: tuple[Any, str, str] = (None, "", "")
    table: list[list[tuple[Any, str, str]]] = [[empty] * len(columns) for _ in rows]
    for gene in genes:
        if gene.name in cells:
            table[rows.index(row(gene))][columns.index(column(gene))] = cells[gene.name]
    figure = go.Figure()
    figure.add_heatmap(
        x=columns,
        y=[escaped(label) for label in rows],
        z=[[cell[0] for cell in line] for line in table],
        text=[[cell[1] for cell in line] for line in table],
        customdata=[[cell[2] for cell in line] for line in table],
        texttemplate="%{text}",
        hovertemplate="%{y}, %{x}: %{text}<br>%{customdata}<extra></extra>",
        xgap=2,
        ygap=2,
        meta=scale,
        colorbar={"title": {"text": title, "side": "top"}, "thickness": 12, "outlinewidth": 0},
        **({"zmin": -4, "zmax": 4, "zmid": 0} if scale == "diverging" else {}),
    )
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(type="category", side="bottom", showgrid=False)
    if len(columns) > CROWDED:
        figure.update_xaxes(tickangle=90)
    figure.update_layout(
        height=110 + 26 * len(rows) + 8 * max(map(len, columns)),
        meta={"columns": len(columns), "label": max(map(len, rows))},
    )
    return plain(figure, alt)
