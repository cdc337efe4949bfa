"""A scan while it runs and when it is done: the models, the best and worst edits, and the kinds of edits."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from llmevo.errors import plural
from llmevo.reports.text import clock, say, with_error
from llmevo.run.scan import Row, Scan, luck

SHOWN = 10
"""Edits that are listed, the best first."""
EVERY = 30.0
"""Seconds between two lines of progress."""


class Progress:
    """Lines of progress; give `watch` to `Scan.run`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last = 0.0

    def watch(self, scan: Scan, row: Row) -> None:
        if row.kind == "model":
            say(self.console, f"  {row.path}: {with_error(row.score, row.stderr)}")
        elif time.monotonic() - self._last > EVERY or not scan.left:
            self._last = time.monotonic()
            done, left = len(scan.rows), scan.seconds_left
            time_left = f", {clock(left)} left" if left else ""
            best = f"; best so far {scan.best[0].path}: {scan.best[0].effect:+.3f}" if scan.best else ""
            say(self.console, f"  {done}/{done + scan.left}{time_left}{best}")


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the measured edits by group, in the order of the scan."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.kind != "model" and row.score is not None:
            found.setdefault(row.group, []).append(row)
    return found


def show(scan: Scan, console: Console) -> None:
    """Print the result of a finished scan."""
    tables = [_models(scan), _edits(scan), _groups(scan)]
    for title, table in tables:
        say(console, f"\n{title}", "bold")
        console.print(table)
    for line in remarks(scan):
        say(console, line)


def remarks(scan: Scan) -> list[str]:
    """Return what a reader has to know of the numbers."""
    count, failed = len(scan.best), [row for row in scan.rows if row.failed]
    asked = ", ".join(f"{number} of {task}" for task, number in scan.questions.items())
    lines = [
        f"Effects are differences of the mean probability of right answers from that of {scan.of}, on the same"
        f" questions ({asked}); ± one standard error. It is a choice's probability among the choices, else that of a"
        " token of the answer, as a geometric mean.",
        f"Of {plural(count, 'edit')} the best one is expected to stand out by up to {luck(count):.1f} standard errors"
        " even where none has an effect; score good ones on other questions.",
    ]
    if scan.counted:
        lines.append(f"By their own metric, as right answers are not known: {', '.join(scan.counted)}.")
    if scan.without:
        lines.append(f"Left out, as a judge or a person scores them: {', '.join(scan.without)}.")
    if failed:
        lines.append(f"{plural(len(failed), 'edit')} cannot be exported or measured, such as {failed[0].path}:")
        lines.append(f"  {failed[0].failed}")
    return lines


def _models(scan: Scan) -> tuple[str, Table]:
    rows = [row for row in scan.rows if row.kind == "model"]
    table = _table("model", "probability", "right")
    for row in sorted(rows, key=lambda row: -(row.score or 0.0)):
        table.add_row(row.name, with_error(row.score, row.stderr), _percent(row.right))
    return "Models", table


def _edits(scan: Scan) -> tuple[str, Table]:
    table = _table("path", "effect", "right", "layers")
    for row in scan.best[:SHOWN]:
        table.add_row(row.path, with_error(row.effect, row.stderr, "+"), _percent(row.right), str(row.layers))
    return f"The best of {plural(len(scan.best), 'edit')} of {scan.of}", table


def _groups(scan: Scan) -> tuple[str, Table]:
    table = _table("kind and layers", "edits", "mean effect", "best", "at", "worst", "at")
    for name, rows in groups(scan.rows).items():
        best, worst = max(rows, key=lambda row: row.effect), min(rows, key=lambda row: row.effect)
        mean = sum(row.effect for row in rows) / len(rows)
        ends = [f"{best.effect:+.3f}", span(best)]
        if len(rows) > 1:
            ends += [f"{worst.effect:+.3f}", span(worst)]
        table.add_row(name, str(len(rows)), f"{mean:+.3f}", *ends)
    return "Kinds of edits", table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for place, name in enumerate(columns):
        options: dict[str, Any] = {} if place == 0 or name == "at" else {"justify": "right"}
        table.add_column(name, overflow="fold", **options)
    return table


def span(row: Row) -> str:
    """Return the layers of an edit: `2-4`, or `all layers`."""
    return "all layers" if row.is_whole else f"{row.start}-{row.stop}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"
