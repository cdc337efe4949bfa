"""A comparison as a picture: best score so far against evaluations, and the final scores."""

import io
import math
from collections.abc import Sequence
from typing import Any

from llmevo.errors import plural
from llmevo.reports.comparison.compare import Comparison
from llmevo.reports.comparison.statistics import CONFIDENCE

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Told apart also by people who see few colours (Okabe and Ito, https://jfly.uni-koeln.de/color)."""


STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}


GREY = "#777777"


FEWEST = 3
"""Seeds from which a band is drawn: that of two is as wide as the picture, so these are drawn themselves."""


def draw(comparison: Comparison) -> bytes:
    """The picture, as PNG."""
    import matplotlib as mpl  # slow to import, and only drawn at the end
    from matplotlib.figure import Figure

    names = sorted(of.name for of in comparison.optimizers)  # so that each keeps its colour whoever wins
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    with mpl.rc_context(STYLE):
        height = 4.2 + 0.25 * max(0, len(names) - 6)
        figure = Figure(figsize=(11, height), dpi=150, layout="constrained")  # without pyplot's windows and state
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _curves(left, comparison, colours)
        _finals(right, comparison, colours)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": "llmevo"})
    return out.getvalue()


def _curves(axes: Any, comparison: Comparison, colours: dict[str, str]) -> None:
    """The mean best score so far of each optimizer, with its band."""
    for of in comparison.optimizers:
        mean, low, high = (_floats(values) for values in (of.curve.mean, of.curve.low, of.curve.high))
        evaluations, look = range(1, len(mean) + 1), {"color": colours[of.name], "drawstyle": "steps-post"}
        axes.plot(evaluations, mean, label=of.name, linewidth=1.8, **look)
        if len(of.seeds) >= FEWEST:
            axes.fill_between(evaluations, low, high, color=colours[of.name], alpha=0.1, linewidth=0, step="post")
            continue
        for run in comparison.runs:
            if run.optimizer == of.name:
                axes.plot(evaluations, _floats(run.best), linewidth=0.7, alpha=0.5, **look)
    bests = [_floats(run.best) for run in comparison.runs]
    known = [value for best in bests for value in best[comparison.start_rows - 1 :] if math.isfinite(value)]
    if known:  # the climb through the start rows is the same for all and would flatten the rest
        room = 0.08 * (max(known) - min(known)) or 0.01
        axes.set_ylim(min(known) - room, max(known) + room)
    axes.axvline(comparison.start_rows, color=GREY, linewidth=0.8, linestyle=":")
    axes.annotate(
        " start rows", (comparison.start_rows, 0.01), xycoords=("data", "axes fraction"), color=GREY, fontsize=8
    )
    axes.set_xlim(1, comparison.budget * 1.02)  # the last step is to be seen
    axes.set_xlabel("evaluations")
    axes.set_ylabel(f"best search score so far ({plural(comparison.items, 'question')})")
    seeds = min(len(of.seeds) for of in comparison.optimizers)
    spread = f"its {CONFIDENCE:.0%} confidence band" if seeds >= FEWEST else "each of them"
    axes.set_title(f"Mean of {plural(seeds, 'seed')} and {spread}" if seeds > 1 else "One seed")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 1), ncols=2 if len(colours) > 4 else 1)


def _finals(axes: Any, comparison: Comparison, colours: dict[str, str]) -> None:
    """What each optimizer came to: every seed, the mean, and its standard error."""
    for row, of in enumerate(reversed(comparison.optimizers)):
        values = [getattr(run, comparison.final) for run in comparison.runs if run.optimizer == of.name]
        known = [value for value in values if value is not None]
        axes.scatter(known, [row] * len(known), color=colours[of.name], alpha=0.35, s=18, linewidths=0)
        if of.final:
            axes.errorbar(of.final.mean, row, xerr=of.final.stderr, color=colours[of.name], fmt="o", ms=7, capsize=3)
    for place, (name, score) in enumerate(_rivals(comparison.rows)):
        axes.axvline(score, color=GREY, linewidth=0.8, linestyle=("--", ":")[place])
        axes.annotate(
            f" {name}", (score, 1), xycoords=("data", "axes fraction"), color=GREY, fontsize=8, va="top", rotation=90
        )
    axes.set_yticks(range(len(comparison.optimizers)), [of.name for of in reversed(comparison.optimizers)])
    axes.set_ylim(-0.6, len(comparison.optimizers) - 0.4)
    held = comparison.final == "heldout"
    axes.set_xlabel(f"held-out score ({plural(comparison.heldout_items, 'question')})" if held else "search score")
    axes.set_title("In the end: every seed, mean ± standard error")


def _rivals(rows: dict[str, float]) -> list[tuple[str, float]]:
    """The best of base, parents and other weights for all models, and the uniform merge."""
    others = {name: score for name, score in rows.items() if name != "uniform"}
    best = max(others, key=lambda name: others[name], default=None)
    found = [] if best is None else [(best, others[best])]
    return [*found, *(("uniform", rows[name]) for name in rows if name == "uniform")]


def _floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
