"""What a proposer is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from llmevo.prompting import Prompt

LONGEST_PAUSE = 20.0
"""Seconds between two tries at most, where the server does not say when to come back."""


def patience(timeout: float, retries: int) -> float:
    """After how many seconds a server that never answers is given up: all tries with the pauses between them."""
    return timeout * (retries + 1) + sum(min(LONGEST_PAUSE, 2.0**place) for place in range(retries))


@dataclass(frozen=True)
class Connection:
    """How to reach the LLM: the `llm:` of a config, with the key from wherever it came."""

    model: str | None = None
    """A name the server knows, or for `local` a model reference."""
    api_key: str | None = field(default=None, repr=False)
    base_url: str | None = None
    temperature: float | None = None
    """None leaves it to the server; reasoning models refuse any."""
    max_tokens: int = 4096
    """Of an answer, thoughts included."""
    timeout: float = 120.0
    """Seconds a request may take."""
    retries: int = 4
    """Further tries after a failure that may pass."""
    root: Path = Path()
    """Where relative paths start."""
    transcript: Path | None = None
    """For `recorded`: an earlier run's folder or events.jsonl."""
    price: tuple[float, float] = (0.0, 0.0)
    """Money per million prompt and completion tokens."""
    section: str = "llm"
    """Where in the config this stands, for messages."""

    def key_ways(self) -> str:
        """How to give its key."""
        return f"{'--api-key, ' if self.section == 'llm' else ''}{self.section}.api_key_env or .api_key_file"

    def way(self, option: str) -> str:
        """What mends a key of it: the option of the command line, which only `llm` has."""
        return f"--{option.replace('_', '-')}" if self.section == "llm" else f"its {option}"


@dataclass(frozen=True)
class Reply:
    """An answer, as text, and what it took."""

    text: str
    model: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    problems: tuple[str, ...] = ()
    """What went wrong on the way to it."""


class Proposer(Protocol):
    """Answers prompts; needs to know nothing of recipes."""

    @property
    def style(self) -> str:
        """The prompting style that suits its model."""
        ...

    @property
    def model(self) -> str:
        """The model's name, for the log."""
        ...

    def check(self) -> None:
        """Find out before the run starts whether there is anybody to ask. Raises ProposerRefused if not."""
        ...

    def answer(self, prompt: Prompt) -> Reply:
        """Raises ProposerError when there is no answer, ProposerRefused when there never will be one."""
        ...
