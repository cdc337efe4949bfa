"""The interface of language models: a request in, a reply out; and the lookup of API keys."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from llmevo.errors import UserError


class Price(BaseModel):
    """The price of an LLM, per million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompt: float = Field(default=0.0, ge=0)
    """Of the tokens that it reads."""
    completion: float = Field(default=0.0, ge=0)
    """Of the tokens that it writes, reasoning included."""


LETTERS = 4
"""Letters of a token, roughly."""

LONGEST_PAUSE = 20.0
"""The most seconds between two tries, where the server names no time to come back."""


def patience(timeout: float, retries: int) -> float:
    """Return the seconds until a server that never answers is given up: all tries and the pauses between them."""
    return timeout * (retries + 1) + sum(min(LONGEST_PAUSE, 2.0**place) for place in range(retries))


@dataclass(frozen=True)
class Connection:
    """The connection to an LLM: the `llm:` of a config, with the key itself."""

    model: str | None = None
    """A name the server knows, or for `local` a model reference."""
    api_key: str | None = field(default=None, repr=False)
    base_url: str | None = None
    temperature: float | None = None
    """None leaves it to the server; reasoning models refuse any."""
    max_tokens: int = 4096
    """The most tokens of an answer, with thoughts."""
    timeout: float = 120.0
    """The most seconds of a request."""
    retries: int = 4
    """Further tries after a temporary failure."""
    root: Path = Path()
    """The folder of relative paths."""
    folder: Path | None = None
    """For `local`: the folder of the model."""
    transcript: Path | None = None
    """For `recorded`: an earlier run's folder or events.jsonl."""
    price: tuple[float, float] = (0.0, 0.0)
    """Money per million prompt and completion tokens."""
    section: str = "llm"
    """The section of the config, for messages."""

    def key_ways(self) -> str:
        """Return the ways to give its key, for messages."""
        return f"{'--api-key, ' if self.section == 'llm' else ''}{self.section}.api_key_env or .api_key_file"

    def way(self, option: str) -> str:
        """Return an option's name for messages: that of the command line, which only `llm` has."""
        return f"--{option.replace('_', '-')}" if self.section == "llm" else f"its {option}"


@dataclass(frozen=True)
class Request:
    """A request to a language model: messages, and the form of the answer."""

    messages: Sequence[dict[str, str]]
    schema: dict[str, Any] | None = None
    """The JSON schema of the answer, for servers that can enforce it."""
    integers: int = 0
    """For constrained decoding: the number of fixed-width integers that continue the prompt; 0 for prose."""
    digits: int = 0
    """The width of those integers."""
    samples: int = 1
    """The number of continuations."""
    generation: int = 0
    """The generation of the search; a recording answers by it."""
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """An answer as text, with its tokens and cost."""

    text: str
    model: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    problems: tuple[str, ...] = ()
    """The failures before it, for the log."""


class Client(Protocol):
    """The interface to a language model. It does not depend on recipes."""

    @property
    def style(self) -> str:
        """The prompting style of its model."""
        ...

    @property
    def model(self) -> str:
        """The model's name, for the log."""
        ...

    def check(self) -> None:
        """Raise ProposerRefused, before the run starts, if no request can succeed."""
        ...

    def answer(self, request: Request) -> Reply:
        """Answer a request. Raises ProposerError when there is no answer, ProposerRefused when none can come."""
        ...


VARIABLE = "OPENAI_API_KEY"
"""The environment variable with the key for the server of `ADDRESS`, or else OpenAI's."""

ADDRESS = "OPENAI_BASE_URL"
"""The environment variable with the address of that server. The openai client reads it too."""

DEFAULT = "https://api.openai.com/v1"


def is_own_server(base_url: str | None) -> bool:
    """Return whether the environment's key is for this server: same scheme, host and port."""
    return base_url is None or _origin(base_url) == _origin(os.environ.get(ADDRESS) or DEFAULT)


def read_key(
    file: Path | str | None, root: Path, place: str, variable: str | None = None, base_url: str | None = None
) -> str | None:
    """Return the key in a file, or in the environment variable of the config; without both, OPENAI_API_KEY if that is
    for this server, or None.

    Relative paths start at `root`. Raises UserError, with the section `place` of the config, for a file that cannot be
    read or has no key, a variable that is not set, and OPENAI_API_KEY for another server.
    """
    if file is not None:
        try:
            if key := (root / Path(file).expanduser()).read_text().strip():
                return key
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UserError(f"{place}.api_key_file: {file} cannot be read ({reason})") from error
        raise UserError(f"{place}.api_key_file: {file} is empty; write the key into it")
    if variable == VARIABLE and not is_own_server(base_url):
        raise UserError(
            f"{place}.api_key_env: {VARIABLE} is for its own server only; keep the key of"
            f" {without_password(base_url or DEFAULT)} in a variable of another name"
        )
    if variable is not None:
        if key := os.environ.get(variable):
            return key
        raise UserError(f"{place}.api_key_env: the environment variable {variable} is not set; set it to the key")
    return os.environ.get(VARIABLE) or None if is_own_server(base_url) else None


def withheld(key: str | None, base_url: str | None) -> str:
    """Return the explanation why a key of the environment was not sent to this server, or an empty text."""
    if key or is_own_server(base_url) or not os.environ.get(VARIABLE):
        return ""
    return f"{VARIABLE} was not sent, as it is for {without_password(os.environ.get(ADDRESS) or DEFAULT)}"


def without_password(address: str) -> str:
    """Return an address without its user and password."""
    scheme, separator, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def _origin(address: str) -> tuple[str, str | None, int | None] | str:
    try:
        parts = urlsplit(address)
        return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    except ValueError:  # no address: equal to itself only
        return address
