"""Where messages go, and the command line as it may be shown."""

import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
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


console = Terminal()
failures = Terminal(stderr=True)


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
