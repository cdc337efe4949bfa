"""The curves of a comparison, for the page and as a picture: best score so far, and the final scores."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmevo.errors import plural
from llmevo.reports.comparison.compare import Comparison, Optimizer, Result
from llmevo.reports.comparison.statistics import CONFIDENCE

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
"""Distinct for colour-blind readers (Okabe and Ito, https://jfly.uni-koeln.de/color), on white and on black."""
DASHES = ("solid", "dash", "dot", "dashdot")
GREY = "#777777"
FEWEST = 3
"""Seeds from which a band is drawn: that of two is as wide as the picture, so these are drawn themselves."""


@dataclass(frozen=True)
class Line:
    """One optimizer as it is drawn."""

    optimizer: Optimizer
    colour: str
    dash: str
    runs: Sequence[Result]
    """The runs of the optimizer."""

    @property
    def thin(self) -> Sequence[Result]:
        """The runs that are drawn one by one, where there is no band."""
        return self.runs if 1 < len(self.runs) < FEWEST else ()


def lines(comparison: Comparison) -> list[Line]:
    """Return the optimizers with their colours, by name: an optimizer keeps its colour wherever it ranks."""
    names = sorted(of.name for of in comparison.optimizers)
    found: list[Line] = []
    for of in comparison.optimizers:
        place = names.index(of.name)
        runs = [run for run in comparison.runs if run.optimizer == of.name]
        found.append(Line(of, COLOURS[place % len(COLOURS)], DASHES[place % len(DASHES)], runs))
    return found


def score_range(comparison: Comparison) -> tuple[float, float] | None:
    """Return the scores after the start rows, with some room; the climb through the start rows would flatten them."""
    later = [score for run in comparison.runs for score in run.best[comparison.start_rows - 1 :] if score is not None]
    room = 0.08 * (max(later) - min(later)) or 0.01 if later else 0.0
    return (min(later) - room, max(later) + room) if later else None


def rivals(comparison: Comparison) -> list[tuple[str, float]]:
    """Return the best held-out row but uniform, and uniform: what a merge has to beat."""
    rows = comparison.rows
    best = max((name for name in rows if name != "uniform"), key=lambda name: rows[name], default=None)
    return [(name, rows[name]) for name in (best, "uniform") if name in rows]


def draw(comparison: Comparison) -> bytes:
    """Draw both as a PNG."""
    import matplotlib as mpl  # slow to import, and only drawn at the end
    from matplotlib.figure import Figure

    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    with mpl.rc_context(style):
        height = 4.2 + 0.25 * max(0, len(comparison.optimizers) - 6)
        figure = Figure(figsize=(11, height), dpi=150, layout="constrained")  # without pyplot's windows and state
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _curves(left, comparison)
        _finals(right, comparison)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": "llmevo"})
    return out.getvalue()


def _curves(axes: Any, comparison: Comparison) -> None:
    for line in lines(comparison):
        curve, look = line.optimizer.curve, {"color": line.colour, "drawstyle": "steps-post"}
        evaluations = range(1, len(curve.mean) + 1)
        axes.plot(evaluations, _floats(curve.mean), label=line.optimizer.name, linewidth=1.8, **look)
        if len(line.runs) >= FEWEST:
            low, high = _floats(curve.low), _floats(curve.high)
            axes.fill_between(evaluations, low, high, color=line.colour, alpha=0.1, linewidth=0, step="post")
        for run in line.thin:
            axes.plot(range(1, len(run.best) + 1), _floats(run.best), linewidth=0.7, alpha=0.5, **look)
    axes.set_ylim(score_range(comparison))
    start = comparison.start_rows
    axes.axvline(start, color=GREY, linewidth=0.8, linestyle=":")
    axes.annotate(" start rows", (start, 0.01), xycoords=("data", "axes fraction"), color=GREY, fontsize=8)
    axes.set_xlim(1, comparison.budget * 1.02)  # the last step is visible
    axes.set_xlabel("evaluations")
    axes.set_ylabel(f"best search score so far ({plural(comparison.items, 'question')})")
    seeds = min(len(of.seeds) for of in comparison.optimizers)
    spread = f"its {CONFIDENCE:.0%} confidence band" if seeds >= FEWEST else "each of them"
    axes.set_title(f"Mean of {plural(seeds, 'seed')} and {spread}" if seeds > 1 else "One seed")
    axes.legend(
        frameon=False, loc="upper left", bbox_to_anchor=(0, 1), ncols=2 if len(comparison.optimizers) > 4 else 1
    )


def _finals(axes: Any, comparison: Comparison) -> None:
    for row, line in enumerate(reversed(lines(comparison))):
        known = [value for run in line.runs if (value := comparison.final_score(run)) is not None]
        axes.scatter(known, [row] * len(known), color=line.colour, alpha=0.35, s=18, linewidths=0)
        if final := line.optimizer.final:
            axes.errorbar(final.mean, row, xerr=final.stderr, color=line.colour, fmt="o", ms=7, capsize=3)
    for (name, score), dash in zip(rivals(comparison), ("--", ":"), strict=False):
        axes.axvline(score, color=GREY, linewidth=0.8, linestyle=dash)
        top = {"xycoords": ("data", "axes fraction"), "va": "top", "rotation": 90}
        axes.annotate(f" {name}", (score, 1), color=GREY, fontsize=8, **top)
    axes.set_yticks(range(len(comparison.optimizers)), [of.name for of in reversed(comparison.optimizers)])
    axes.set_ylim(-0.6, len(comparison.optimizers) - 0.4)
    held = comparison.final == "heldout"
    axes.set_xlabel(f"held-out score ({plural(comparison.heldout_items, 'question')})" if held else "search score")
    axes.set_title("Final scores: every seed, mean ± standard error")


def _floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
