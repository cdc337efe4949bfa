"""Several runs on one page: their curves, their held-out rows, and the tables of a comparison."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plotly import graph_objects as go  # pyright: ignore[reportMissingTypeStubs]

from llmevo.errors import plural
from llmevo.reports.comparison.chart import DASHES, FEWEST, lines, rivals, score_range
from llmevo.reports.comparison.compare import Comparison, compare
from llmevo.reports.comparison.statistics import CONFIDENCE
from llmevo.reports.comparison.tables import tables
from llmevo.reports.html.figures import Plot, escaped, plain
from llmevo.reports.html.page import render
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import read_log


def comparison_page(folders: Sequence[Path], name: str) -> str:
    """Return the page of finished runs. Raises RunError that names why runs are not comparable."""
    comparison = compare(folders)
    has_band = min(len(of.seeds) for of in comparison.optimizers) >= FEWEST
    return render(
        "comparison.html.j2",
        {"figures": {"curves": curves(comparison), "finals": finals(comparison)}},
        {},
        name=name,
        comparison=comparison,
        tables=tables(comparison),
        rows=heldout_rows(comparison),
        band=f"with its {CONFIDENCE:.0%} confidence band" if has_band else "each run thin",
    )


def heldout_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return for each run every held-out row with its standard error, and the best search score."""
    found: list[dict[str, Any]] = []
    for run in comparison.runs:
        state = RunState.fold(iter(read_log(Path(run.folder))))
        cells = {row.row: (row.score, row.stderr) for row in state.heldout.values()}
        best = state.best
        search = (best.value, best.score.stderr) if best and best.score else (None, None)
        found.append({"run": run, "cells": cells, "search": search})
    return found


def curves(comparison: Comparison) -> Plot:
    """Draw the mean best score so far of each optimizer, with its band, or with its single runs."""
    figure = go.Figure()
    for line in lines(comparison):
        name, curve = escaped(line.optimizer.name), line.optimizer.curve
        shape = {"color": line.colour, "shape": "hv", "dash": line.dash}
        if len(line.runs) >= FEWEST:
            band = [
                (place, low, high)
                for place, (low, high) in enumerate(zip(curve.low, curve.high, strict=True), start=1)
                if low is not None
            ]
            red, green, blue = (int(line.colour[at : at + 2], 16) for at in (1, 3, 5))
            figure.add_scatter(
                x=[place for place, _, _ in band] + [place for place, _, _ in reversed(band)],
                y=[high for _, _, high in band] + [low for _, low, _ in reversed(band)],
                fill="toself",
                fillcolor=f"rgba({red}, {green}, {blue}, 0.12)",
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
                legendgroup=name,
            )
        for run in line.thin:
            figure.add_scatter(
                x=[*range(1, len(run.best) + 1)],
                y=run.best,
                mode="lines",
                line={**shape, "width": 0.8},
                opacity=0.6,
                hovertemplate=f"{name}, seed {run.seed}: %{{y:.3f}} after %{{x}}<extra></extra>",
                showlegend=False,
                legendgroup=name,
            )
        figure.add_scatter(
            x=[*range(1, len(curve.mean) + 1)],
            y=curve.mean,
            mode="lines",
            name=name,
            line={**shape, "width": 2.2},
            hovertemplate="%{y:.3f} after %{x}",
            legendgroup=name,
        )
    figure.update_layout(xaxis_title="evaluations", yaxis_title="best search score so far", hovermode="closest")
    figure.update_yaxes(range=score_range(comparison))
    ends = [(of.name, of.curve.mean[-1]) for of in comparison.optimizers if of.curve.mean]
    told = "; ".join(f"{name} {score:.3f}" for name, score in ends if score is not None)
    return plain(figure, f"In the end: {told}. The tables above have the scores.")


def finals(comparison: Comparison) -> Plot:
    """Draw the final score of every run, and what a merge has to beat."""
    figure, held = go.Figure(), comparison.final == "heldout"
    for line in lines(comparison):
        known = [(run, value) for run in line.runs if (value := comparison.final_score(run)) is not None]
        errors = {"type": "data", "array": [run.heldout_stderr or 0.0 for run, _ in known], "thickness": 1}
        figure.add_scatter(
            x=[value for _, value in known],
            y=[escaped(line.optimizer.name)] * len(known),
            error_x=errors if held else None,
            mode="markers",
            marker={"color": line.colour, "size": 9},
            text=[f"seed {run.seed}" for run, _ in known],
            hovertemplate="%{text}: %{x:.3f}<extra></extra>",
            showlegend=False,
        )
    first, last = (escaped(comparison.optimizers[place].name) for place in (0, -1))
    for (name, score), dash in zip(rivals(comparison), DASHES[1:], strict=False):
        figure.add_scatter(
            x=[score, score],
            y=[first, last],
            mode="lines",
            name=escaped(name),
            line={"dash": dash, "width": 1.5},
            meta="ink",
            hovertemplate=f"{escaped(name)}: %{{x:.3f}}<extra></extra>",
        )
    title = "held-out score" if held else "search score"
    figure.update_layout(xaxis_title=title, hovermode="closest", height=170 + 40 * len(comparison.optimizers))
    figure.update_yaxes(type="category", autorange="reversed")
    return plain(figure, f"{plural(len(comparison.runs), 'run')}; the table of every run below has their {title}s.")
