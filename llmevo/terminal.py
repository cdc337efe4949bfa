"""Where messages go, and the command line as it may be shown."""

from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console

from llmevo.errors import LlmevoError, UserError

console = Console()
failures = Console(stderr=True)


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
