"""Any OpenAI-compatible server: OpenAI, vLLM, Ollama, llama.cpp, ..."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import httpx
import openai
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from llmevo.errors import ProposerError, ProposerRefused
from llmevo.llm.client import LONGEST_PAUSE, Connection, Reply, Request, is_own_server, withheld, without_password
from llmevo.llm.json import writable

LONGEST = 1_000_000
"""Bytes of an answer at most; a long one of a thinking model has a tenth of that."""

PLAIN = {"accept-encoding": "identity"}
"""The header that asks for answers as they are: packed ones could grow past any limit while they are read."""


class TooLongError(openai.OpenAIError):
    """An answer that does not end, and would come again."""


def bounded(seconds: float) -> Callable[[httpx.Response], None]:
    """A hook for httpx that limits the whole of an answer; httpx's own timeouts begin anew with every byte."""

    def hook(response: httpx.Response) -> None:
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = _Bounded(response.stream, time.monotonic() + seconds)

    return hook


class _Bounded(httpx.SyncByteStream):
    """A stream that raises when it is too long or too late."""

    def __init__(self, stream: httpx.SyncByteStream, end: float) -> None:
        self._stream, self._end = stream, end

    def __iter__(self) -> Iterator[bytes]:
        length = 0
        for chunk in self._stream:
            length += len(chunk)
            if length > LONGEST:
                raise TooLongError(f"the answer is longer than {LONGEST:,} bytes")
            if time.monotonic() > self._end:
                raise httpx.ReadTimeout("the answer did not end in time")
            yield chunk

    def close(self) -> None:
        self._stream.close()


DEFAULT_MODEL = "gpt-4o"

WORTH_RETRYING = (
    openai.APIConnectionError,  # includes timeouts
    openai.RateLimitError,
    openai.InternalServerError,
    openai.ConflictError,
)
"""Failures that may pass by themselves; every other one would come again."""

SAID_OF = {
    "response_format": ("response_format", "json_schema", "schema", "structured"),
    "temperature": ("temperature",),
    "max_completion_tokens": ("max_completion_tokens", "max_tokens"),  # a gateway may have renamed what it was sent
    "max_tokens": ("max_tokens", "max_completion_tokens"),
    "seed": ("seed",),
}
"""How a refusal names the option it is about."""

OTHERWISE = {"max_completion_tokens": "max_tokens", "max_tokens": "max_completion_tokens"}
"""What other servers call an option."""


def _formats(schema: Any) -> list[dict[str, Any]]:
    """The ways to hold an answer to a schema: OpenAI's, and llama-cpp-python's, which refuses that."""
    named = {"name": "Answer", "schema": schema, "strict": True}
    return [{"type": "json_schema", "json_schema": named}, {"type": "json_object", "schema": schema}]


SENT = ("accept", "authorization", "connection", "content-", "host", "user-agent", "x-stainless-")
"""How the headers begin that go to servers other than the environment's own. The client adds what OPENAI_ORG_ID,
OPENAI_PROJECT_ID and OPENAI_CUSTOM_HEADERS say."""

SECRET = 8
"""Characters of a key from which on it is removed from replies too; a shorter one may be a word, such as `none`."""

LETTERS = 4
"""Letters a token, roughly: for servers that do not count."""

LONGEST_WAIT = 60.0
"""Seconds to wait at most for a server that says when to come back."""

PATIENCE = 10.0
"""Seconds for a list of the server's models, before a run."""


class OpenAIClient:
    """A chat model behind the official client."""

    style = "chat"

    def __init__(self, connection: Connection) -> None:
        """Raises ProposerRefused without a key for OpenAI's own server; a server of one's own may need none."""
        if not connection.api_key and not connection.base_url:
            ours = connection.section == "llm"
            raise ProposerRefused(
                f"{connection.section}: there is no API key; set OPENAI_API_KEY or give"
                f" {connection.way('api_key' if ours else 'api_key_file')}, name your own server with"
                f" {connection.way('base_url')}"
                + (", or use a model on this machine with `llm: {proposer: local}`" if ours else "")
            )
        if connection.api_key and not (connection.api_key.isascii() and connection.api_key.isprintable()):
            raise ProposerRefused(f"{connection.section}: the API key holds characters that no key has; copy it again")
        if connection.base_url and not connection.base_url.lower().startswith(("http://", "https://")):
            raise ProposerRefused(
                f"{connection.section}: the address {connection.base_url!r} of the server has no scheme; write"
                f" {connection.way('base_url')} http://{connection.base_url.removeprefix('//')}, or https://…"
            )
        self._connection = connection
        self.model = connection.model or DEFAULT_MODEL
        # Of openai 2 and 3 alike: both take httpx's client, though only the types of 2 say so.
        requests = [] if is_own_server(connection.base_url) else [_strip_headers]
        hooks = {"request": requests, "response": [bounded(connection.timeout)]}
        http: Any = httpx.Client(timeout=connection.timeout, follow_redirects=True, event_hooks=hooks)
        # Retrying is tenacity's, in one place; the client's own would multiply with it.
        self._client = openai.OpenAI(
            api_key=connection.api_key or "none",
            base_url=connection.base_url,
            timeout=connection.timeout,
            max_retries=0,
            default_headers=PLAIN,
            http_client=http,
        )
        # Servers of one's own may not know the new name, and some pass over what they do not know.
        longest = "max_tokens" if connection.base_url else "max_completion_tokens"
        self._options: dict[str, Any] = {longest: connection.max_tokens, "seed": None}
        if connection.temperature is not None:
            self._options["temperature"] = connection.temperature
        self._tried: set[str] = set()
        """Options that were refused, under whatever name."""
        self._format = 0
        """Which of the ways to ask for a schema the server takes; past the last, none."""
        self._lost = False
        self._address = without_password(str(self._client.base_url))

    def check(self) -> None:
        try:
            self._client.with_options(timeout=min(PATIENCE, self._connection.timeout), max_retries=0).models.list()
        except openai.APITimeoutError:
            pass  # it is slow, or busy with an answer
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._refused(error) from None
        except openai.APIConnectionError as error:
            raise ProposerRefused(
                f"{self._connection.section}: no server answers at {self._address} ({self._hidden(error)});"
                f" check {self._connection.way('base_url')}"
            ) from None
        except (openai.OpenAIError, ValueError, AttributeError, TypeError):
            pass  # a server without a list of models may still answer

    def answer(self, request: Request) -> Reply:
        """Retries what may pass by itself; after an answer was lost, the next one is asked for once only."""
        problems: list[str] = []
        attempts = Retrying(
            retry=retry_if_exception_type(WORTH_RETRYING),
            stop=stop_after_attempt(1 if self._lost else self._connection.retries + 1),
            wait=_wait,
            before_sleep=lambda state: problems.append(self._reason(state)),
            reraise=True,
        )
        self._lost = True  # until it answers
        try:
            completion = attempts(self._complete, request, problems)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise self._refused(error) from None
        except (openai.OpenAIError, ValueError) as error:  # a ValueError for what should be JSON and is not
            raise ProposerError(f"{self._address}: {self._hidden(error)}") from None
        try:
            reply = self._reply(request, completion, problems)
            self._lost = False
            return reply
        except (AttributeError, TypeError):  # JSON, or a page, of another kind
            text = self._hidden(ValueError(completion))
            way = self._connection.way("base_url")
            raise ProposerError(f"{self._address} sent no chat completion ({text}); check {way}") from None

    def _complete(self, request: Request, problems: list[str]) -> Any:
        """One request. An option that the server refuses is left out and the request repeated.

        An option that the refusal names is left out ever after, or asked for as other servers want it; a schema also
        when the refusal names nothing, but then for this request only: the fault may lie elsewhere. Some servers refuse
        with the status of a failure.
        """
        options: dict[str, Any] = {
            name: request.seed if name == "seed" else value for name, value in self._options.items()
        }
        formats = _formats(request.schema)[self._format :] if request.schema else []
        while True:
            asked: dict[str, Any] = {**options, "response_format": formats[0]} if formats else options
            try:
                return self._client.chat.completions.create(
                    model=self.model, messages=cast(Any, request.messages), **asked
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError, openai.InternalServerError) as error:
                named = next((name for name in asked if any(word in str(error) for word in SAID_OF[name])), None)
                failed = isinstance(error, openai.InternalServerError)
                refused = named or ("response_format" if formats and not failed else None)
                if refused is None:
                    raise
                if refused == "response_format":
                    formats = formats[1:] if named else []
                    self._format += bool(named)
                    instead = "another form of it" if formats else ""
                else:
                    instead = self._leave_out(refused, options)
                then = f"asked with {instead} instead" if instead else "asked without it"
                problems.append(f"the server refused a request with {refused}; {then} ({self._hidden(error)})")

    def _leave_out(self, name: str, options: dict[str, Any]) -> str:
        """From these options and all later ones. Its other name, if it has one that was not refused yet: then the
        option is sent under that one; else nothing.
        """
        self._tried.add(name)
        value, other = options.pop(name), OTHERWISE.get(name)
        renamed = other if other and other not in self._tried else ""
        if renamed:
            options[renamed] = value
        self._options = dict(options)
        return renamed

    def _reply(self, request: Request, completion: Any, problems: list[str]) -> Reply:
        choice = next(iter(completion.choices), None)
        text = writable(self._redacted((choice.message.content if choice else None) or ""))
        if choice and choice.finish_reason == "length":
            most = f"{self._connection.max_tokens} tokens; raise {self._connection.section}.max_tokens"
            problems.append(f"the answer was cut at {most}")
        usage = completion.usage
        read = sum(len(message["content"]) for message in request.messages)
        spent = (usage.prompt_tokens, usage.completion_tokens) if usage else (read // LETTERS, len(text) // LETTERS)
        if not usage:
            problems.append("the server counts no tokens; they are estimated from the texts' lengths")
        cost = sum(tokens * price for tokens, price in zip(spent, self._connection.price, strict=True)) / 1e6
        return Reply(text, self._redacted(completion.model or self.model), *spent, cost, tuple(problems))

    def _refused(self, error: openai.OpenAIError) -> ProposerRefused:
        of = self._connection
        unsent = withheld(of.api_key, of.base_url)
        key = f"{unsent}: give this server's key with {of.key_ways()}; or check" if unsent else "check the API key,"
        return ProposerRefused(
            f"{of.section}: {self._address} refuses ({self._hidden(error)}); {key} {of.way('base_url')} and"
            f" {of.way('model')} {self.model}"
        )

    def _reason(self, state: RetryCallState) -> str:
        error = state.outcome.exception() if state.outcome else None
        return f"retried after {self._hidden(error)}"

    def _hidden(self, error: BaseException | None) -> str:
        """An error's text, without the key: servers like to repeat it."""
        text = re.sub(r"://[^/@\s]+@", "://", f"{type(error).__name__}: {error}")  # passwords in addresses
        return self._redacted(text, 1)[:300]  # cut last, or half a key could stay

    def _redacted(self, text: str, least: int = SECRET) -> str:
        """A text of the server's without the key, if that has so many characters."""
        key = self._connection.api_key or ""
        return text.replace(key, "***") if len(key) >= least else text


def _strip_headers(request: httpx.Request) -> None:
    """A hook for httpx."""
    for name in [*request.headers]:
        if not name.lower().startswith(SENT):
            del request.headers[name]


def _wait(state: RetryCallState) -> float:
    """As long as the server asks for; else random, below a bound that doubles from 1 second: see `patience`."""
    error = state.outcome.exception() if state.outcome else None
    headers: Mapping[str, str] = error.response.headers if isinstance(error, openai.APIStatusError) else {}
    try:
        return min(max(0.0, float(headers["retry-after"])), LONGEST_WAIT)
    except (KeyError, ValueError):
        return wait_random_exponential(multiplier=1, max=LONGEST_PAUSE)(state)
