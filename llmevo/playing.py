"""A run shown again, event by event, as it was seen live. Reads its log only."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.rule import Rule
from rich.text import Text

from llmevo import display, events
from llmevo.config import Config
from llmevo.errors import RunError
from llmevo.plurals import plural
from llmevo.state import RunState

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
    """Show it: the picture in a terminal, lines elsewhere.

    `speed` is a multiple of the real one; by default ten events a second in a terminal and all at once elsewhere.
    `generation` shows only that one, 0 for the start rows. `prompts` adds what the LLM was asked and has answered.
    Raises RunError for a generation that is not in the log.
    """
    view, state = display.Display(console, config, run, loading=""), RunState()
    live = Live(console=console, refresh_per_second=10, transient=True) if console.is_terminal else None
    shown = 0
    with live or nullcontext():
        for event in recorded:
            now, before = len(state.told), state.latest
            state.apply(event)
            if generation is not None and (now != generation or isinstance(event, events.HeldOut | events.RunFinished)):
                continue
            shown += 1
            sleep(_pause(console, before, event, speed))
            if prompts and isinstance(event, events.Prompted):
                _print_prompt(console, event)
            if live:
                live.update(view.picture(state, console.height))
            elif line := view.line(event, state):
                view.say(line)
    if generation is not None and not shown:
        raise RunError(f"{run}: has no generation {generation}; it has 0 to {len(state.told) - 1}")
    if live:
        console.print(view.picture(state))
    if state.finished:
        display.summary(console, state, run, config)
    else:
        console.print(f"The run is unfinished; `llmevo resume {run}` goes on with it.", highlight=False)


def _pause(console: Console, before: datetime | None, event: events.Event, speed: float | None) -> float:
    """Seconds until an event is shown."""
    if speed is None:
        return READABLE if console.is_terminal else 0.0
    return max(0.0, (datetime.fromisoformat(event.time) - before).total_seconds() / speed) if before else 0.0


def _print_prompt(console: Console, event: events.Prompted) -> None:
    """To the letter: nothing of it is read as markup, wrapped or cut."""
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
