"""The page of a scan: a heat map of all edits, and the same as a table."""

from typing import Any

from plotly import graph_objects as go  # pyright: ignore[reportMissingTypeStubs]

from llmevo.reports.html.figures import Plot, escaped, plain
from llmevo.reports.html.page import render
from llmevo.reports.terminal.scan import groups, remarks, span
from llmevo.reports.text import with_error
from llmevo.run.scan import Row, Scan


def scan_page(scan: Scan, name: str) -> str:
    """Return the page of a scan, finished or not."""
    models = [row for row in scan.rows if row.kind == "model"]
    found, drawn = groups(scan.rows), effects(scan)
    return render(
        "scan.html.j2",
        {"figures": {"effects": drawn} if drawn else {}},
        {},
        name=name,
        scan=scan,
        models=sorted(models, key=lambda row: -(row.score or 0.0)),
        remarks=remarks(scan),
        groups=found,
        span=span,
    )


def effects(scan: Scan) -> Plot | None:
    """Draw every edit of a block: kinds as rows, the first layer as columns, coloured by the effect; None if none."""
    found = {name: rows for name, rows in groups(scan.rows).items() if not rows[0].is_whole}
    if not found:
        return None
    columns = [*range(scan.scorer.layers)]
    table: list[list[Row | None]] = [[None] * len(columns) for _ in found]
    for line, rows in zip(table, found.values(), strict=True):
        for row in rows:
            line[row.start] = row
    sizes = sorted(abs(row.effect) for rows in found.values() for row in rows)
    most = sizes[int(0.9 * (len(sizes) - 1))] or 1.0  # a few blocks are worth ten times the others
    figure = go.Figure()
    figure.add_heatmap(
        x=[str(column) for column in columns],
        y=[escaped(name) for name in found],
        z=[[None if row is None else max(-most, min(most, row.effect)) for row in line] for line in table],
        text=[["" if row is None else f"{row.effect:+.2f}" for row in line] for line in table],
        customdata=[["" if row is None else _hover(row) for row in line] for line in table],
        texttemplate="%{text}",
        hovertemplate="%{customdata}<extra></extra>",
        xgap=1,
        ygap=1,
        zmin=-most,
        zmax=most,
        zmid=0,
        meta="diverging",
        colorbar={"title": {"text": "effect", "side": "top"}, "thickness": 12, "outlinewidth": 0},
    )
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(type="category", title="first layer of the block", showgrid=False)
    longest = max((len(name) for name in found), default=0)
    figure.update_layout(height=120 + 26 * len(found), meta={"columns": len(columns), "label": longest})
    best = ", ".join(f"{row.path} {row.effect:+.2f}" for row in scan.best[:3])
    return plain(figure, f"The best edits: {best}. The tables below have all.")


def _hover(row: Row) -> str:
    parts: list[Any] = [
        f"{row.group}, layers {span(row)}",
        with_error(row.effect, row.stderr, "+"),
        row.path,
    ]
    return "<br>".join(escaped(str(part)) for part in parts)
