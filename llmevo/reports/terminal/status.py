"""The status of runs, from their logs. Changes nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmevo.config import parse_logged
from llmevo.errors import RunError, UserError
from llmevo.reports.quantized_scores import served_best
from llmevo.reports.terminal.workers import lines
from llmevo.reports.text import clock, with_error
from llmevo.run.comparison import siblings
from llmevo.run.log.state import RunState, failures
from llmevo.run.log.storage import LOG, Tail, consistent_log, is_written, readable
from llmevo.run.log.worker_history import WorkerRecord
from llmevo.run.progress import Left, left
from llmevo.run.spending import Spending

MOST = 8
"""Lines of workers below the table, for each run."""
STYLES = {"running": "bold cyan", "stopped": "yellow", "finished": "green", "broken": "red", "deleted": "red"}


@dataclass(frozen=True)
class Status:
    """One run."""

    run: str
    state: Literal["running", "stopped", "finished", "broken", "deleted"]
    """running: a live process holds its log. broken: its log cannot be read; the rest is of the lines before. deleted:
    its log was there before, in `llmevo serve`."""
    reason: str = ""
    """Why it is broken or deleted."""
    optimizer: str = ""
    progress: float = 0.0
    """The share of the budget that is spent, 0 to 1."""
    spent: str = ""
    """The same in words."""
    evaluations: int = 0
    failed: int = 0
    generation: int = 0
    """The one that was asked for last; 0 for the start rows."""
    best: int | None = None
    """The id of the best candidate so far."""
    score: float | None = None
    stderr: float | None = None
    violated: str = ""
    """The constraints that the best violates: no candidate satisfies them all."""
    front: list[int] = field(default_factory=list[int])
    """The candidates of the Pareto front."""
    heldout: float | None = None
    heldout_stderr: float | None = None
    served: float | None = None
    """The held-out score of the best in the format of `engine.quantize`."""
    served_stderr: float | None = None
    format: str = ""
    """That format."""
    age: float | None = None
    """Seconds since the last event."""
    left: float | None = None
    """Seconds that a running one is expected to take."""
    step: float | None = None
    """Seconds of these until the next event; negative where it is later than expected."""
    rate: float | None = None
    """Questions a second of all workers of a running one together."""
    workers: list[WorkerRecord] = field(default_factory=list[WorkerRecord])
    """The workers of a running one."""


def status(run: Path) -> Status:
    """Return the status of one run. A log that cannot be read is a status, not an error."""
    state, reason, written, tail = RunState(), "", False, Tail(run)
    try:
        with readable(tail.file), consistent_log(run):
            written = is_written(run)
            while found := tail.new():
                for event in found:
                    state.apply(event)
    except RunError as error:
        reason = str(error)
    return status_of(run, state, written, reason, siblings(run, state.started) if state.started and written else ())


def status_of(run: Path, state: RunState, written: bool, reason: str = "", others: Sequence[RunState] = ()) -> Status:
    """Return the status of a run that was read; `reason` says why it could be read no further, and `others` are the
    other runs of its comparison.
    """
    known: dict[str, Any] = {}
    try:
        known = _known(state, run, written, others)
    except UserError as error:  # a config that this version does not read
        reason = reason or str(error)
    if state.started is None and state.latest is not None:
        reason = reason or f"{run / LOG} does not begin with run_started: its first line is missing; restore the file"
    kind = "broken" if reason else "finished" if state.finished else "running" if written else "stopped"
    return Status(str(run), kind, reason, **known)


def _known(state: RunState, run: Path, written: bool, others: Sequence[RunState]) -> dict[str, Any]:
    if state.started is None or state.latest is None:
        return {}
    config = parse_logged(state.started.config, f"{run}/{LOG}")
    search = config.search
    best, held, both = state.best, state.heldout.get("best"), served_best(state)
    age = (datetime.now(UTC) - state.latest).total_seconds()
    expected = left(state, config, others) if written and not state.finished else Left()
    ahead = expected.after(age)
    return {
        "optimizer": search.optimizer,
        "progress": Spending(search.budget, state).progress,
        "spent": str(Spending(search.budget, state)),
        "evaluations": len(state.trials),
        "failed": len(failures(state)),
        "generation": state.generation,
        "best": best.candidate.id if best else None,
        "score": best.value if best else None,
        "stderr": best.score.stderr if best and best.score else None,
        "violated": best.reason if best else "",
        "front": [trial.candidate.id for trial in state.front],
        "heldout": held.score if held else None,
        "heldout_stderr": held.stderr if held else None,
        "served": both.served.total if both else None,
        "served_stderr": both.served.stderr if both else None,
        "format": both.format if both else "",
        "age": round(age, 3),
        "rate": round(state.worker_history.rate, 3) if written and state.worker_history.present else None,
        "workers": state.worker_history.present if written else [],
        "left": round(ahead, 3) if ahead else None,
        "step": round(expected.now - age, 3) if ahead and expected.now else None,
    }


COLUMNS = ("run", "state", "done", "gen", "best", "held-out", "ago", "left")


def table(statuses: Sequence[Status]) -> RenderableType:
    """Return one line a run below its folder, and why some cannot be read."""
    rows = [_row(of) for of in statuses]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    parts: list[RenderableType] = []
    for folder, group in groupby(zip(statuses, rows, strict=True), key=lambda pair: Path(pair[0].run).parent):
        grid = Table.grid(padding=(0, 1, 0, 0))
        for name, width in zip(COLUMNS, widths, strict=True):
            least = min(width, 10) if name == "run" else width
            grid.add_column(justify="left" if name in COLUMNS[:2] else "right", min_width=least, max_width=width)
        if not parts:
            grid.add_row(*COLUMNS, style="bold")
        for of, row in group:
            grid.add_row(*(Text(cell, STYLES[of.state] if cell == of.state else "") for cell in row))
        parts += [Text(f"{folder}/", style="dim"), grid]
    parts += [Text(f"{of.run}: {line}") for of in statuses for line in lines(of.workers, of.rate or 0.0, MOST)]
    parts += [
        Text(f"{of.run}: in {of.format} the best holds out {with_error(of.served, of.served_stderr)}")
        for of in statuses
        if of.format
    ]
    parts += [Text(f"{of.run}: {of.reason}", style="red") for of in statuses if of.reason]
    parts += [Text(f"{of.run}: the best {of.violated}", style="yellow") for of in statuses if of.violated]
    parts += [Text(f"{of.run}: Pareto front {', '.join(f'#{n}' for n in of.front)}") for of in statuses if of.front]
    return Group(*parts)


def _row(of: Status) -> list[str]:
    return [
        Path(of.run).resolve().name,
        of.state,
        of.spent.removesuffix(" evaluations") + (f", {of.failed} failed" if of.failed else ""),
        str(of.generation) if of.spent else "",
        with_error(of.score, of.stderr) + ("!" if of.violated else ""),
        with_error(of.heldout, of.heldout_stderr),
        "" if of.age is None else ago(of.age),
        "" if of.left is None else clock(of.left),
    ]


def ago(seconds: float) -> str:
    """Return a time span in its largest unit: `12 s`, `5 min`, `3 h`, `9 d`."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
