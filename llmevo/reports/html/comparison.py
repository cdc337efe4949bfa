"""Several runs on one page: their curves, their held-out rows, and the tables of a comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plotly import graph_objects as go  # pyright: ignore[reportMissingTypeStubs]

from llmevo.reports.comparison.chart import COLOURS, FEWEST
from llmevo.reports.comparison.compare import Comparison, compare
from llmevo.reports.comparison.statistics import CONFIDENCE
from llmevo.reports.comparison.tables import tables
from llmevo.reports.html.figures import Plot, plain, text_of
from llmevo.reports.html.page import render
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import read_log

DASHES = ("solid", "dash", "dot", "dashdot")


def comparison_page(folders: Sequence[Path], name: str) -> str:
    """The page of finished runs. Raises RunError for runs that cannot be set side by side, naming why."""
    comparison = compare(folders)
    drawn = {"curves": curves(comparison), "finals": finals(comparison)}
    band = f"with its {CONFIDENCE:.0%} confidence band" if min(_seeds(comparison)) >= FEWEST else "each run thin"
    return render(
        "comparison.html.j2",
        {"figures": drawn, "tasks": [], "candidates": [], "effects": []},
        {},
        name=name,
        comparison=comparison,
        tables=tables(comparison),
        rows=heldout_rows(comparison),
        band=band,
    )


def heldout_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Of each run, every held-out row with its standard error, and the best search score."""
    found: list[dict[str, Any]] = []
    for run in comparison.runs:
        state = RunState.fold(iter(read_log(Path(run.folder))))
        cells = {row.row: (row.score, row.stderr) for row in state.heldout.values()}
        best = state.best
        search = (best.value, best.score.stderr) if best and best.score else (None, None)
        found.append({"run": run, "cells": cells, "search": search})
    return found


def curves(comparison: Comparison) -> Plot:
    """The mean best score so far of each optimizer, with its band, or with its single runs."""
    figure = go.Figure()
    for name, colour, dash in _looks(comparison):
        of = next(of for of in comparison.optimizers if of.name == name)
        places = [*range(1, len(of.curve.mean) + 1)]
        shape = {"color": colour, "shape": "hv", "dash": dash}
        if len(of.seeds) >= FEWEST:
            known = [n for n, low in enumerate(of.curve.low) if low is not None]
            edge = [places[n] for n in known]
            figure.add_scatter(
                x=edge + edge[::-1],
                y=[of.curve.high[n] for n in known] + [of.curve.low[n] for n in reversed(known)],
                fill="toself",
                fillcolor=f"rgba({_channels(colour)}, 0.12)",
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
                legendgroup=name,
            )
        elif len(of.seeds) > 1:
            for run in comparison.runs:
                if run.optimizer == name:
                    figure.add_scatter(
                        x=[*range(1, len(run.best) + 1)],
                        y=run.best,
                        mode="lines",
                        line={**shape, "width": 0.8},
                        opacity=0.6,
                        hovertemplate=f"{text_of(name)}, seed {run.seed}: %{{y:.3f}} after %{{x}}<extra></extra>",
                        showlegend=False,
                        legendgroup=name,
                    )
        figure.add_scatter(
            x=places,
            y=of.curve.mean,
            mode="lines",
            name=text_of(name),
            line={**shape, "width": 2.2},
            hovertemplate="%{y:.3f} after %{x}",
            legendgroup=name,
        )
    figure.update_layout(xaxis_title="evaluations", yaxis_title="best search score so far", hovermode="closest")
    # The climb through the start rows is the same for all and would flatten the rest.
    later = [score for run in comparison.runs for score in run.best[comparison.start_rows - 1 :] if score is not None]
    if later:
        room = 0.08 * (max(later) - min(later)) or 0.01
        figure.update_yaxes(range=[min(later) - room, max(later) + room])
    return plain(figure)


def finals(comparison: Comparison) -> Plot:
    """What every run came to, on the questions that count, beside what a merge has to beat."""
    figure = go.Figure()
    for name, colour, _ in _looks(comparison):
        own = [run for run in comparison.runs if run.optimizer == name]
        values = [(run, getattr(run, comparison.final)) for run in own]
        known = [(run, value) for run, value in values if value is not None]
        held = comparison.final == "heldout"
        figure.add_scatter(
            x=[value for _, value in known],
            y=[text_of(name)] * len(known),
            error_x={"type": "data", "array": [run.heldout_stderr or 0.0 for run, _ in known], "thickness": 1}
            if held
            else None,
            mode="markers",
            marker={"color": colour, "size": 9},
            text=[f"seed {run.seed}" for run, _ in known],
            hovertemplate="%{text}: %{x:.3f}<extra></extra>",
            showlegend=False,
        )
    rivals = sorted(comparison.rows.items(), key=lambda row: row[1])[-2:]
    for place, (name, score) in enumerate(rivals):
        figure.add_scatter(
            x=[score, score],
            y=[text_of(comparison.optimizers[0].name), text_of(comparison.optimizers[-1].name)],
            mode="lines",
            name=text_of(name),
            line={"dash": DASHES[place + 1], "width": 1.5},
            meta="ink",
            hovertemplate=f"{text_of(name)}: %{{x:.3f}}<extra></extra>",
        )
    title = "held-out score" if comparison.final == "heldout" else "search score"
    figure.update_layout(xaxis_title=title, hovermode="closest", height=170 + 40 * len(comparison.optimizers))
    figure.update_yaxes(type="category", autorange="reversed")
    return plain(figure)


def _looks(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Name, colour and dash of each optimizer; by name, so that each keeps its own whoever wins."""
    names = sorted(of.name for of in comparison.optimizers)
    colours = [colour for colour in COLOURS if colour != "#000000"]  # which no dark page shows
    return [(name, colours[n % len(colours)], DASHES[n % len(DASHES)]) for n, name in enumerate(names)]


def _channels(colour: str) -> str:
    return ", ".join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))


def _seeds(comparison: Comparison) -> list[int]:
    return [len(of.seeds) for of in comparison.optimizers]
