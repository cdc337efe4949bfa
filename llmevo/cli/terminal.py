"""Where messages go, and the command line as it may be shown."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from functools import wraps
from types import FrameType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from llmevo.errors import LlmevoError, UserError

UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters but for tab and newline, and those that turn the direction of writing: in a terminal, texts of
models, servers and logs could move the cursor with them, change what stands there, or reach the clipboard."""


class Terminal(Console):
    """A console for texts of others. What it shows has no control characters but its own, and square brackets and
    colons mean nothing in it: what is to have a style is a `rich.text.Text`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """All that is shown passes here, however deep in tables and panels it stands."""
        for segment in super().render(renderable, options):
            if segment.control or not UNSAFE.search(segment.text):
                yield segment
            else:
                yield Segment(UNSAFE.sub("", segment.text), segment.style)


WIDE = 10_000
"""Columns of what is no terminal: there nothing is wrapped or cut."""


STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, the polite `kill` (also of batch systems and containers), and a terminal that is closed."""


SHOW_CURSOR = b"\x1b[?25h"


def console_of(stderr: bool = False) -> Terminal:
    """As wide as the terminal; where there is none, in a file or a pipe, as wide as any line."""
    made = Terminal(stderr=stderr)
    return made if made.is_terminal else Terminal(stderr=stderr, width=WIDE)


console = console_of()


failures = console_of(stderr=True)


class Stopped(KeyboardInterrupt):
    """A signal asks the program to end."""


@contextmanager
def stoppable() -> Generator[None]:
    """Raise Stopped at the first signal of `STOPPING`, so that all of them end a command as Ctrl-C does; a second one
    ends the program at once. The exit status is 128 + the number of the signal, as shells have it.

    Signals that are ignored, as under nohup, stay ignored.
    """
    received: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        received.append(number)
        for each in handlers:
            signal.signal(each, signal.SIG_DFL)
        if console.is_terminal:  # a second signal leaves no time for it
            with suppress(OSError):
                os.write(1, SHOW_CURSOR)
        raise Stopped(signal.Signals(number).name)

    usual = (signal.SIG_DFL, signal.default_int_handler)
    main = threading.current_thread() is threading.main_thread()  # others cannot have handlers
    handlers = {each: old for each in STOPPING if main and (old := signal.getsignal(each)) in usual}
    for each in handlers:
        signal.signal(each, stop)
    try:
        yield
    except SystemExit as error:
        if received and error.code == 128 + signal.SIGINT:  # what typer makes of every KeyboardInterrupt
            raise SystemExit(128 + received[0]) from None
        raise
    finally:
        if received:
            _flush()
        for each, old in handlers.items():
            signal.signal(each, old)


def _flush() -> None:
    """Python ends with status 120 where it cannot write the rest of its output, as after the terminal was closed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_stopped(text: str) -> None:
    """The last line of a command that was stopped; a terminal that is gone is no failure."""
    with suppress(OSError):
        console.print(f"\n{text}", highlight=False, markup=False, soft_wrap=True)


def with_stop_line(command: Callable[..., None]) -> Callable[..., None]:
    """A command that ends with one line when a signal stops it, unless it has a line of its own for that."""

    @wraps(command)
    def wrapped(*given: Any, **named: Any) -> None:
        try:
            command(*given, **named)
        except KeyboardInterrupt as stop:
            again = " ".join(("llmevo", *without_key(sys.argv[1:])))
            say_stopped(f"Stopped{f' by {stop}' if stop.args else ''}; the same command starts again: `{again}`")
            raise SystemExit(128 + signal.SIGINT) from None

    return wrapped


@contextmanager
def errors_shown() -> Generator[None]:
    """One clear message and an exit status instead of a traceback, for the errors llmevo raises on purpose."""
    try:
        yield
    except UserError as error:
        failures.print(f"Error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    except LlmevoError as error:
        failures.print(f"Failed: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(1) from None


def without_key(words: list[str]) -> list[str]:
    """The command line with the value of --api-key hidden."""
    return [
        "***" if before == "--api-key" else ("--api-key=***" if word.startswith("--api-key=") else word)
        for before, word in zip(["", *words], words, strict=False)
    ]
