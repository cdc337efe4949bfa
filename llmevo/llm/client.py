"""What a client of a language model is: a request in, a reply out; and where its API key stands."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from llmevo.errors import UserError


class Price(BaseModel):
    """What an LLM costs, per million tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompt: float = Field(default=0.0, ge=0)
    completion: float = Field(default=0.0, ge=0)


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
    folder: Path | None = None
    """For `local`: where the model's files are."""
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
class Request:
    """What is sent to a language model: messages, and what form the answer has to have."""

    messages: tuple[dict[str, str], ...]
    schema: dict[str, Any] | None = None
    """The JSON schema of the answer, for servers that can hold a model to it."""
    integers: int = 0
    """For constrained decoding: how many fixed-width integers continue the prompt; 0 when it asks for prose."""
    digits: int = 0
    """The width of those integers."""
    samples: int = 1
    """How many continuations are wanted."""
    generation: int = 0
    """The generation of the search that it belongs to; a recording answers by this."""
    seed: int = 0


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


class Client(Protocol):
    """A language model that can be asked. It needs to know nothing of recipes."""

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

    def answer(self, request: Request) -> Reply:
        """Raises ProposerError when there is no answer, ProposerRefused when there never will be one."""
        ...


VARIABLE = "OPENAI_API_KEY"
"""The environment variable with the key for OpenAI's server, or for that of `ADDRESS`."""

ADDRESS = "OPENAI_BASE_URL"
"""The environment variable that names the server that `VARIABLE` is for. The openai client reads it too."""

DEFAULT = "https://api.openai.com/v1"


def is_own_server(base_url: str | None) -> bool:
    """Whether a server is the one that the environment's key is for: same scheme, host and port."""
    return base_url is None or _origin(base_url) == _origin(os.environ.get(ADDRESS) or DEFAULT)


def read_key(
    file: Path | str | None, root: Path, place: str, variable: str | None = None, base_url: str | None = None
) -> str | None:
    """The key in a file, or in the environment variable that the config names; where it names neither, OPENAI_API_KEY,
    if that is for this server. None where there is none.

    Relative paths start at `root`. Raises UserError, with the section of the config at `place`, for a file that cannot
    be read, a variable that is not set, and OPENAI_API_KEY for another server.
    """
    if file is not None:
        try:
            return (root / Path(file).expanduser()).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise UserError(f"{place}.api_key_file: {file} cannot be read ({reason})") from error
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
    """What to say of a server that was sent no key although the environment has one; empty otherwise."""
    if key or is_own_server(base_url) or not os.environ.get(VARIABLE):
        return ""
    return f"{VARIABLE} was not sent, as it is for {without_password(os.environ.get(ADDRESS) or DEFAULT)}"


def without_password(address: str) -> str:
    """An address without the user and password in it."""
    scheme, separator, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def _origin(address: str) -> tuple[str, str | None, int | None] | str:
    try:
        parts = urlsplit(address)
        return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    except ValueError:  # no address: equal to itself only
        return address
