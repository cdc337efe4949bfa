"""The workers of a run: a line for each, and one for each that is lost or left out."""

import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmevo.errors import plural, shortened
from llmevo.reports.text import clock, printable
from llmevo.run.log.events import Worker
from llmevo.run.log.worker_history import WorkerHistory, WorkerRecord
from llmevo.workers.protocol import Doing

WIDE = 90
REASON = 200
"""Characters of the reason for a loss, at most."""
TROUBLE = {"lost": "yellow", "waiting": "yellow", "refused": "red"}
"""The colours of workers that do not score."""


def noticed(event: Worker) -> str:
    """Return a change among the workers as one line."""
    name, reason = f"worker {event.worker}", shortened(flat(event.reason), REASON)
    place = f" ({flat(event.place)})" if event.place else ""
    match event.change:
        case "ready":
            line = f"{name}{place} is ready"
        case "lost":
            request = f"candidate {event.request}" if isinstance(event.request, int) else event.request
            line = (
                f"{name} was lost ({reason}); {f'{request} is scored elsewhere' if request else 'another is started'}"
            )
        case "refused":
            line = f"{name}{place} is left out: {reason}"
        case "waiting":
            line = f"{name} waits: {reason}"
    return flat(line)


def flat(text: str) -> str:
    """Return the text of a worker in one line, without control characters."""
    return printable(" ".join(text.split()))


def numbers(member: WorkerRecord) -> tuple[str, str, str]:
    """Return the questions that a worker answered, its questions a second, and its losses."""
    rate = f"{member.rate:.1f}" if member.rate else ""
    return f"{member.questions:,}", rate, str(member.losses or "")


def last(member: WorkerRecord) -> str:
    """Return what the log says of a worker: what it did last, or why it does nothing."""
    if member.state == "lost":
        return "lost; another is started"
    if member.state == "waiting":
        return f"waits: {flat(member.reason)}"
    if member.state == "refused":
        return f"left out: {flat(member.reason)}"
    return f"scored {flat(member.last)}" if member.last else "ready"


def now(of: Doing) -> str:
    """Return what a worker does now."""
    name = "" if of.request is None else f"candidate {of.request}" if isinstance(of.request, int) else flat(of.request)
    doing = f"{of.stage} {name}".strip()
    waited = time.monotonic() - of.since
    return f"{doing}, {clock(waited)}" if of.stage != "idle" and waited >= 1 else doing


def table(
    worker_history: WorkerHistory, doing: Sequence[Doing] = (), most: int | None = None, width: int | None = None
) -> RenderableType | None:
    """Return a line for each of at most `most` workers; None where there are none. Within less than `WIDE` columns
    their places are left out.

    `doing` are those of a run in this process; the log says only what a worker has done.
    """
    members = {member.name: member for member in worker_history.present}
    busy = {of.worker: of for of in doing}
    names = sorted({*members, *busy}, key=lambda name: (len(name), name))
    if not names:
        return None
    shown = names
    if most is not None and len(names) > most:
        ill = [name for name in names if name in members and members[name].state in TROUBLE]
        first = [*ill, *(name for name in names if name not in ill)][: max(1, most - 1)]
        shown = [name for name in names if name in first]
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
    grid.add_column("worker", no_wrap=True, overflow="ellipsis", max_width=8)
    grid.add_column("now" if doing else "last", no_wrap=True, overflow="ellipsis", ratio=3)
    for name in ("questions", "a second", "lost"):
        grid.add_column(name, justify="right", no_wrap=True)
    if placed := width is None or width >= WIDE:
        grid.add_column("place", no_wrap=True, overflow="ellipsis", ratio=2)
    for name in shown:
        member = members.get(name) or WorkerRecord(name)
        text = now(busy[name]) if name in busy and member.state != "refused" else last(member)
        style = TROUBLE.get(member.state, "")
        place = [Text(flat(member.place), style="dim")] if placed else []
        grid.add_row(Text(flat(name)), Text(text), *map(Text, numbers(member)), *place, style=style)
    if len(shown) == len(names):
        return grid
    rest = Counter(busy[name].stage if name in busy else members[name].state for name in names if name not in shown)
    counts = ", ".join(f"{count} {stage}" for stage, count in rest.most_common())
    return Group(grid, Text(f"and {len(names) - len(shown)} more: {counts}", style="dim", no_wrap=True))


def lines(members: Sequence[WorkerRecord], rate: float, most: int) -> list[str]:
    """Return workers in words: one line together, with their questions a second, and one for each of at most `most`."""
    if not members:
        return []
    ready, losses = sum(member.state == "ready" for member in members), sum(member.losses for member in members)
    facts = [f"{ready} of {plural(len(members), 'worker')} ready", f"{rate:.1f} questions a second" if rate else ""]
    found = [", ".join(filter(None, [*facts, plural(losses, "loss", "losses") if losses else ""]))]
    ordered = sorted(members, key=lambda member: (member.state == "ready", len(member.name), member.name))
    shown = ordered if len(members) <= most else ordered[: most - 1]
    for member in shown:
        questions, speed, lost = numbers(member)
        facts = [f"{questions} questions", f"{speed} a second" if speed else "", f"{lost} lost" if lost else ""]
        found.append(f"worker {flat(member.name)}: {last(member)}; {', '.join(filter(None, facts))}")
    return found if len(shown) == len(members) else [*found, f"and {len(members) - len(shown)} more workers"]
