"""A finished run shown again, event by event, and its best candidates scored again."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from llmevo.config import Config
from llmevo.errors import RunError, plural, quoted
from llmevo.reports.terminal.live import Display, summary
from llmevo.reports.text import say
from llmevo.run.log import changes, events
from llmevo.run.log.state import RunState
from llmevo.run.resume import changed_facts
from llmevo.run.verify import Rescored
from llmevo.run.versions import VERSIONED, versions

if TYPE_CHECKING:  # see `Experiment`
    from llmevo.run.scorer import Scorer

READABLE = 0.1
"""Seconds an event is shown in a terminal."""
RULE = 118
"""Columns of the line between two prompts, at most."""


def play(
    console: Console,
    recorded: Sequence[events.Event],
    config: Config,
    run: Path,
    speed: float | None = None,
    generation: int | None = None,
    prompts: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show a run: the picture in a terminal, lines elsewhere.

    `speed` is a multiple of the real one; by default ten events a second in a terminal and all at once elsewhere.
    `generation` shows only that one, 0 for the start rows. `prompts` adds the prompts and replies.
    Raises RunError for a generation that is not in the log.
    """
    view, state = Display(console, config, run, loading=""), RunState()
    live = Live(console=console, refresh_per_second=10, transient=True) if console.is_terminal else None
    shown = 0
    with live or nullcontext():
        for event in recorded:
            chosen, before = is_of_generation(event, state, generation), state.latest
            state.apply(event)
            if not chosen:
                continue
            shown += 1
            sleep(_pause(console, before, event, speed))
            if prompts and isinstance(event, events.Prompted):
                _print_prompt(console, event)
            if live:
                live.update(view.picture(state, console.height))
            elif line := view.line(event, state):
                say(console, line)
    if generation is not None and not shown:
        raise no_generation(run, generation, state)
    if live:
        console.print(view.picture(state))
    if state.finished:
        summary(console, state, run, config)
    else:
        console.print(f"The run is unfinished; `llmevo resume {quoted(run)}` goes on with it.", highlight=False)


def is_of_generation(event: events.Event, state: RunState, generation: int | None) -> bool:
    """Return whether an event that follows `state` is of a generation; every one is where it is None. Held-out scores
    and the end are of none.
    """
    final = isinstance(event, events.HeldOut | events.Unscored | events.RunFinished)
    return generation is None or (generation == len(state.told) and not final)


def no_generation(run: Path, generation: int, state: RunState) -> RunError:
    """Return the error for a generation that is not in the log."""
    return RunError(f"{run}: has no generation {generation}; it has 0 to {max(0, len(state.told) - 1)}")


def _pause(console: Console, before: datetime | None, event: events.Event, speed: float | None) -> float:
    if speed is None:
        return READABLE if console.is_terminal else 0.0
    return max(0.0, (datetime.fromisoformat(event.time) - before).total_seconds() / speed) if before else 0.0


def _print_prompt(console: Console, event: events.Prompted) -> None:
    """Print a prompt and its reply to the letter: nothing is markup, wrapped or cut."""
    again = ", asked again" if event.repair else ""
    wide = min(console.width, RULE)
    title = Text(f"generation {event.generation}: to {event.model} ({event.style}{again})")
    console.print(Rule(title, align="left"), width=max(wide, title.cell_len + 4))
    for message in event.messages:
        console.print(Text(f"[{message['role']}]", style="bold"))
        console.out(message["content"], highlight=False)
    spent = f"{event.tokens['prompt']} + {plural(event.tokens['completion'], 'token')}, {event.seconds:.1f} s"
    console.print(Text(f"[reply: {spent}]", style="bold"))
    console.out(event.reply if event.reply is not None else f"none: {'; '.join(event.problems)}", highlight=False)
    console.print(Rule(), width=wide)


def show_rescored(console: Console, rows: Sequence[Rescored], started: events.RunStarted, scorer: "Scorer") -> bool:
    """Print the table, and what has changed since. Return whether all scores are what they were."""
    table = Table(box=None, pad_edge=False)
    for column in ("candidate", "from", "in the log", "now", "difference", ""):
        table.add_column(column, justify="left" if column in ("candidate", "from", "") else "right")
    for row in rows:
        now = "failed" if row.now is None else f"{row.now.score:.6f}"
        off = "" if row.now is None else f"{row.now.score - row.logged.score:+.2g}" if row.differing else "0"
        note = row.reason or (f"differs in {', '.join(row.differing)}" if row.differing else "equal")
        origin = row.trial.candidate.note or row.trial.candidate.origin
        table.add_row(f"#{row.trial.candidate.id}", origin[:40], f"{row.logged.score:.6f}", now, off, note)
    console.print(table)
    found = changed_facts(scorer, started)
    equal = not any(row.differing for row in rows)
    if equal and not found:
        return True
    here = versions()
    others = [
        f"{k} {started.versions[k]} (here {here[k]})" for k in VERSIONED if started.versions.get(k, here[k]) != here[k]
    ]
    why = changes.table(found) if found else "  neither the questions nor the models"
    say(console, f"What has changed since:\n{why}")
    if others:
        say(console, f"  versions: {', '.join(others)}")
    return equal
