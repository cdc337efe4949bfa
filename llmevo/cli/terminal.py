"""The terminal: messages, errors, signals, and the command line without its key."""

import os
import signal
import sys
import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from llmevo.errors import LlmevoError, UserError
from llmevo.reports.text import UNSAFE, say

WIDE = 10_000
"""Columns outside a terminal, where nothing is wrapped or cut."""
EXIT_STATUSES = {
    0: "success",
    1: "a failure of the machine, a server, a file or a model; scores that `replay --rescore` found to differ; a run"
    " that `watch` followed and that stopped before its end",
    2: "a mistake in what was given: one message that names the key, the value and the way out; also a log that does"
    " not follow from its config, as `replay --verify` finds",
    129: "stopped because the terminal was closed (SIGHUP)",
    130: "stopped with Ctrl-C (SIGINT)",
    143: "stopped with `kill`, as by a batch system or a container (SIGTERM)",
}
"""{exit status of every command: its meaning}. These never change."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, the polite `kill` (also of batch systems and containers), and a terminal that is closed."""


class Terminal(Console):
    """A console for texts of others. It shows no control characters but its own, and reads no markup, emoji codes or
    numbers in them: styled text is a `rich.text.Text`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Clean every segment, however deep in tables and panels it is."""
        for segment in super().render(renderable, options):
            if segment.control or not UNSAFE.search(segment.text):
                yield segment
            else:
                yield Segment(UNSAFE.sub("", segment.text), segment.style)


def console_of(stderr: bool = False) -> Terminal:
    """Return a console as wide as the terminal; in a file or a pipe, as wide as any line."""
    made = Terminal(stderr=stderr)
    return made if made.is_terminal else Terminal(stderr=stderr, width=WIDE)


console, failures = console_of(), console_of(stderr=True)


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
                os.write(1, b"\x1b[?25h")  # show the cursor
        raise Stopped(signal.Signals(number).name)

    usual = (signal.SIG_DFL, signal.default_int_handler)
    main = threading.current_thread() is threading.main_thread()  # others cannot have handlers
    handlers = {each: old for each in STOPPING if main and (old := signal.getsignal(each)) in usual}
    for each in handlers:
        signal.signal(each, stop)
    try:
        yield
    except SystemExit as error:
        if received and error.code == 128 + signal.SIGINT:  # typer's status for every KeyboardInterrupt
            raise SystemExit(128 + received[0]) from None
        raise
    finally:
        if received:
            _flush()
        for each, old in handlers.items():
            signal.signal(each, old)


def _flush() -> None:
    """Flush the output; Python ends with status 120 where it cannot, as after the terminal was closed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_stopped(text: str) -> None:
    """Print the last line of a command that was stopped; a terminal that is gone is no failure."""
    with suppress(OSError):
        say(console, f"\n{text}")


@contextmanager
def stop_shown() -> Generator[None]:
    """End with one line when a signal stops the program, unless a command prints a line of its own."""
    try:
        yield
    except KeyboardInterrupt as stop:
        by = f" by {stop}" if stop.args else ""
        say_stopped(f"Stopped{by}; the same command starts again: `{command_line()}`")
        raise SystemExit(128 + signal.SIGINT) from None


@contextmanager
def errors_shown() -> Generator[None]:
    """Print a message and exit with a status, instead of a traceback, for the errors that llmevo raises on purpose."""
    try:
        yield
    except LlmevoError as error:
        mistake = isinstance(error, UserError)
        say(failures, f"{'Error' if mistake else 'Failed'}: {error}", "red")
        raise SystemExit(2 if mistake else 1) from None


def command_line() -> str:
    """Return the command that was given, without the value of --api-key."""
    return " ".join(["llmevo", *without_key(sys.argv[1:])])


def without_key(words: list[str]) -> list[str]:
    """Return the command line with the value of --api-key hidden."""
    return [
        "***" if before == "--api-key" else ("--api-key=***" if word.startswith("--api-key=") else word)
        for before, word in zip(["", *words], words, strict=False)
    ]
