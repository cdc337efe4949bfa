"""Votes of a person in the terminal: two replies to a prompt, and a key."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from llmevo.evaluation.judges.verdicts import AskVoter, ShownPair

Choice = Literal["first", "second", "tie", "skip"]
KEYS: dict[str, Choice] = {"a": "first", "b": "second", "t": "tie", "s": "skip"}
HELP = "Which is better?  a  b  t(ie)  s(kip)  q(uit; `llmevo resume` goes on here)"


def booth(console: Console, key: Callable[[], str], paused: Callable[[], AbstractContextManager[None]]) -> AskVoter:
    """Return a function that asks for one vote. `key` waits for one key; `paused` hides everything else meanwhile."""

    def ask(showing: ShownPair) -> Choice:
        try:
            return voted(showing)
        except OSError as error:  # the terminal is gone: closed, or its connection lost
            raise KeyboardInterrupt from error

    def voted(showing: ShownPair) -> Choice:
        with paused():
            console.rule(Text(f"{showing.task}: {showing.left} to vote on"), align="left")
            console.print(Panel(Text(showing.prompt), title="prompt", title_align="left"))
            width = max(20, console.width // 2 - 1)
            console.print(
                Columns(
                    Panel(Text(text or "(nothing)"), title=name, title_align="left", width=width)
                    for name, text in (("A", showing.first), ("B", showing.second))
                )
            )
            console.print(HELP, highlight=False, markup=False)
            while (pressed := _pressed(key)) not in KEYS:
                if pressed in ("q", "\x04", ""):
                    raise KeyboardInterrupt
            console.print(f"{pressed}\n", highlight=False)
            return KEYS[pressed]

    return ask


def _pressed(key: Callable[[], str | None]) -> str:
    """Return the key in lower case; empty at the end of the input."""
    try:
        return (key() or "").lower()
    except EOFError:
        return ""
