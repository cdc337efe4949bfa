"""Any OpenAI-compatible server: OpenAI, vLLM, Ollama, llama.cpp, ..."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import httpx
import openai
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from llmevo.errors import ProposerError, ProposerRefused, RequestRefused, without_passwords
from llmevo.llm.client import (
    LETTERS,
    LONGEST_PAUSE,
    Connection,
    Reply,
    Request,
    is_own_server,
    withheld,
    without_password,
)
from llmevo.llm.json import scalars, without_surrogates

DEFAULT_MODEL = "gpt-4o"
LONGEST = 1_000_000
"""The most bytes of an answer; a long one of a thinking model has a tenth of that."""

LONGEST_COMPRESSED = LONGEST // 100
"""The most bytes of a compressed answer, which may grow a thousandfold."""

PLAIN = {"accept-encoding": "identity"}
"""The header that asks for uncompressed answers; a server need not heed it."""

WORTH_RETRYING = (
    openai.APIConnectionError,  # includes timeouts
    openai.RateLimitError,
    openai.InternalServerError,
    openai.ConflictError,
)
"""Failures that may be temporary; every other one would occur again."""

SAID_OF = {
    "response_format": ("response_format", "json_schema", "schema", "structured"),
    "temperature": ("temperature",),
    "max_completion_tokens": ("max_completion_tokens", "max_tokens"),  # a gateway may rename an option
    "max_tokens": ("max_tokens", "max_completion_tokens"),
    "seed": ("seed",),
}
"""The words by which a refusal names an option."""

TOO_LARGE = ("at most", "context", "exceed", "less than", "maximum", "too large", "too long")
"""Words of a refusal of so many tokens, which is no refusal of the option."""

OTHERWISE = {"max_completion_tokens": "max_tokens", "max_tokens": "max_completion_tokens"}
"""Other servers' names of options."""

SENT = ("accept", "authorization", "connection", "content-", "host", "user-agent", "x-stainless-")
"""Prefixes of the headers that are sent to other servers than the environment's own. The client adds those of
OPENAI_ORG_ID, OPENAI_PROJECT_ID and OPENAI_CUSTOM_HEADERS."""

SECRET = 8
"""The length from which a key is removed from replies too; a shorter one may be a word, such as `none`."""

LONGEST_NAME = 200
"""Characters of the name that a server gives its model."""

MOST_TOKENS = 10**9
"""More are no number of tokens of one answer."""

LONGEST_WAIT = 60.0
"""The most seconds to wait for a server that names a time to come back."""

PATIENCE = 10.0
"""Seconds for a list of the server's models, before a run."""


class TooLongError(openai.OpenAIError):
    """An answer that does not end, and would come again."""


class _Bounded(httpx.SyncByteStream):
    """A stream that raises when it is too long or too late; httpx's own timeouts start again with every byte."""

    def __init__(self, stream: httpx.SyncByteStream, end: float, longest: int) -> None:
        self._stream, self._end, self._longest = stream, end, longest

    def __iter__(self) -> Iterator[bytes]:
        length = 0
        for chunk in self._stream:
            length += len(chunk)
            if length > self._longest:
                raise TooLongError(f"the answer is longer than {self._longest:,} bytes")
            if time.monotonic() > self._end:
                raise httpx.ReadTimeout("the answer did not end in time")
            yield chunk

    def close(self) -> None:
        self._stream.close()


def _bounded(seconds: float) -> Callable[[httpx.Response], None]:
    """Return a hook for httpx that limits the whole of an answer."""

    def hook(response: httpx.Response) -> None:
        assert isinstance(response.stream, httpx.SyncByteStream)
        plain = response.headers.get("content-encoding", "identity") == "identity"
        longest = LONGEST if plain else LONGEST_COMPRESSED
        response.stream = _Bounded(response.stream, time.monotonic() + seconds, longest)

    return hook


def _strip_headers(request: httpx.Request) -> None:
    """Remove the environment's headers: a hook for httpx."""
    for name in [*request.headers]:
        if not name.lower().startswith(SENT):
            del request.headers[name]


def _formats(schema: Any) -> list[dict[str, Any]]:
    """Return the forms of a schema: OpenAI's, and that of llama-cpp-python, which refuses the first."""
    named = {"name": "Answer", "schema": schema, "strict": True}
    return [{"type": "json_schema", "json_schema": named}, {"type": "json_object", "schema": schema}]


def _pattern_of(key: str) -> re.Pattern[str]:
    r"""Return a pattern of a key whose characters may be escaped, as in JSON (`\/`, `\u002f`) or URLs (`%2F`).

    A JSON text inside another one doubles the backslashes, a second quoting of URLs makes `%25` of `%`.
    """
    forms: list[str] = []
    for each in key:
        plain, code = re.escape(each), f"(?i:{ord(each):02x})"
        if not each.isalnum():
            plain = r"\\{0,8}" + plain
        forms.append(rf"(?:{plain}|\\{{1,8}}u00{code}|%(?:25){{0,3}}{code})")
    return re.compile("".join(forms))


class OpenAIClient:
    """A chat model behind the official client."""

    style = "chat"

    def __init__(self, connection: Connection) -> None:
        """Raises ProposerRefused without a key for OpenAI's own server; other servers may need none."""
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
        if connection.base_url and "?" in connection.base_url:  # which may hold a key
            raise ProposerRefused(
                f"{connection.section}: the address {without_password(connection.base_url.partition('?')[0])} of the"
                f" server has a query after it (?…), which no path can follow; leave it out of"
                f" {connection.way('base_url')}, and give a key with {connection.key_ways()}"
            )
        self._connection = connection
        self._key = _pattern_of(connection.api_key) if connection.api_key else None
        self.model = connection.model or DEFAULT_MODEL
        # openai 2 and 3 both take httpx's client, though only the types of 2 say so.
        requests = [] if is_own_server(connection.base_url) else [_strip_headers]
        hooks = {"request": requests, "response": [_bounded(connection.timeout)]}
        http: Any = httpx.Client(timeout=connection.timeout, follow_redirects=True, event_hooks=hooks)
        try:
            self._client = openai.OpenAI(
                api_key=connection.api_key or "none",
                base_url=connection.base_url,
                timeout=connection.timeout,
                max_retries=0,  # tenacity retries
                default_headers=PLAIN,
                http_client=http,
            )
        except Exception as error:  # a port that is no number, …; the text may hold a password
            raise ProposerRefused(
                f"{connection.section}: the address of the server is no valid one ({type(error).__name__}); check"
                f" {connection.way('base_url')}"
            ) from None
        # Other servers may not know the new name, and some ignore unknown options.
        longest = "max_tokens" if connection.base_url else "max_completion_tokens"
        self._options: dict[str, Any] = {longest: connection.max_tokens, "seed": None}
        if connection.temperature is not None:
            self._options["temperature"] = connection.temperature
        self._tried: set[str] = set()
        """Names of options that were refused."""
        self._format = 0
        """The form of a schema that the server accepts; past the last, none."""
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
        except (openai.OpenAIError, ValueError, AttributeError, TypeError, RecursionError):
            pass  # a server without a list of models may still answer

    def answer(self, request: Request) -> Reply:
        """Retries after temporary failures; after an answer was lost, the next request is sent once only."""
        problems: list[str] = []
        attempts = Retrying(
            retry=retry_if_exception_type(WORTH_RETRYING),
            stop=stop_after_attempt(1 if self._lost else self._connection.retries + 1),
            wait=_wait,
            before_sleep=lambda state: problems.append(f"retried after {self._hidden(_error_of(state))}"),
            reraise=True,
        )
        self._lost = True  # until it answers
        try:
            completion = attempts(self._complete, request, problems)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise self._refused(error) from None
        except (openai.OpenAIError, ValueError, RecursionError) as error:  # the last two for invalid or deep JSON
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
        """Send one request. An option that the server refuses is left out and the request repeated.

        An option that the refusal names is left out of later requests too, or sent in the form of other servers; but
        for this request only where so many tokens are too many. A schema is also left out when the refusal names
        nothing, but then for this request only: the cause may be another. Some servers refuse with the status of a
        failure.
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
                said = _wording(error)
                named = _named_option(error, said, asked)
                failed = isinstance(error, openai.InternalServerError)
                refused = named or ("response_format" if formats and not failed else None)
                if refused is None:
                    raise
                if refused == "response_format":
                    formats = formats[1:] if named else []
                    self._format += bool(named)
                    instead = "another form of it" if formats else ""
                elif refused in OTHERWISE and any(word in said.lower() for word in TOO_LARGE):
                    del options[refused]
                    instead = ""
                else:
                    instead = self._leave_out(refused, options)
                then = f"asked with {instead} instead" if instead else "asked without it"
                problems.append(f"the server refused a request with {refused}; {then} ({self._hidden(error)})")

    def _leave_out(self, name: str, options: dict[str, Any]) -> str:
        """Rename an option in this request and all later ones, or remove it if the other name was refused too.

        Returns the other name, or an empty text.
        """
        self._tried.add(name)
        value, other = options.pop(name), OTHERWISE.get(name)
        renamed = other if other and other not in self._tried else ""
        if renamed:
            options[renamed] = value
        self._options.pop(name, None)
        if renamed:
            self._options[renamed] = value
        return renamed

    def _reply(self, request: Request, completion: Any, problems: list[str]) -> Reply:
        choice = next(iter(completion.choices), None)
        text = self._redacted(_text(choice.message.content) if choice else "")
        if choice and choice.finish_reason == "length":
            most = f"{self._connection.max_tokens} tokens; raise {self._connection.section}.max_tokens"
            problems.append(f"the answer was cut at {most}")
        usage = completion.usage
        counts = (getattr(usage, f"{kind}_tokens", None) for kind in ("prompt", "completion", "total"))
        spent = _tokens(*counts)
        if not spent:
            read = sum(len(message["content"]) for message in request.messages)
            spent = read // LETTERS, len(text) // LETTERS
            problems.append("the server counts no tokens; they are estimated from the texts' lengths")
        cost = sum(tokens * price for tokens, price in zip(spent, self._connection.price, strict=True)) / 1e6
        model = self._redacted(str(completion.model or self.model))[:LONGEST_NAME]
        return Reply(text, model, *spent, cost, tuple(problems))

    def _refused(self, error: openai.OpenAIError) -> ProposerRefused:
        kind = ProposerRefused if isinstance(error, openai.AuthenticationError) else RequestRefused
        of = self._connection
        unsent = withheld(of.api_key, of.base_url)
        key = f"{unsent}: give this server's key with {of.key_ways()}; or check" if unsent else "check the API key,"
        return kind(
            f"{of.section}: {self._address} refuses ({self._hidden(error)}); {key} {of.way('base_url')} and"
            f" {of.way('model')} {self.model}"
        )

    def _hidden(self, error: BaseException | None) -> str:
        """Return an error's text without the key, which servers often repeat."""
        text = without_passwords(_wording(error))
        return self._redacted(text, 1)[:300]  # cut last, or half a key could stay

    def _redacted(self, text: str, least: int = SECRET) -> str:
        """Return a text of the server's as a log can hold it, without a key of at least so many characters."""
        text = without_surrogates(text)
        return self._key.sub("***", text) if self._key and len(self._connection.api_key or "") >= least else text


def _wording(error: BaseException | None) -> str:
    """Return an error's text, with what the server said."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, openai.APIStatusError) and error.body and str(error) == f"Error code: {error.status_code}":
        text += f" - {_said(error)}"  # the client repeats texts in OpenAI's form only
    return text


def _said(error: openai.APIStatusError) -> str:
    """Return what a refusal says; of FastAPI's details, which may repeat the request, the places and messages."""
    body: Any = error.body
    details: Any = body.get("detail", body) if isinstance(body, dict) else body
    if isinstance(details, list) and details and all(isinstance(each, dict) and "msg" in each for each in details):
        return "; ".join(f"{'.'.join(map(str, scalars(each.get('loc', []))))}: {each['msg']}" for each in details)
    return details if isinstance(details, str) else error.response.text


def _named_option(error: openai.APIStatusError, said: str, asked: Mapping[str, Any]) -> str | None:
    """Return the option that a refusal names, first of all in its `param`."""
    for text in (str(error.param or ""), said):
        for name in asked:
            if any(word in text for word in SAID_OF[name]):
                return name
    return None


def _text(content: Any) -> str:
    """Return the text of an answer. Some servers send a list of parts, thoughts among them, which are left out."""
    if not isinstance(content, list):
        return content or ""
    texts: list[str] = []
    for part in cast(list[Any], content):
        match part:
            case {"text": str(text)} if part.get("type", "text") == "text":
                texts.append(text)
            case _:
                pass
    return "".join(texts)


def _tokens(prompt: Any, completion: Any, total: Any) -> tuple[int, int] | None:
    """Return a server's numbers of tokens, of which some count those of thoughts in the total only; None where it sent
    something else.
    """
    counts = [of for of in (prompt, completion) if isinstance(of, int) and 0 <= of <= MOST_TOKENS]
    if not counts[1:]:
        return None
    thoughts = total - sum(counts) if isinstance(total, int) and total <= MOST_TOKENS else 0
    return counts[0], counts[1] + max(thoughts, 0)


def _error_of(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _wait(state: RetryCallState) -> float:
    """Return the server's waiting time, or a random one below a bound that doubles from 1 second: see `patience`."""
    error = _error_of(state)
    headers: Mapping[str, str] = error.response.headers if isinstance(error, openai.APIStatusError) else {}
    try:
        return min(max(0.0, float(headers["retry-after"])), LONGEST_WAIT)
    except (KeyError, ValueError):
        return wait_random_exponential(multiplier=1, max=LONGEST_PAUSE)(state)
