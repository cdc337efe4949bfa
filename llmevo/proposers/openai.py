"""Any OpenAI-compatible server: OpenAI, vLLM, Ollama, llama.cpp, ..."""

from collections.abc import Mapping
from typing import Any, cast

import httpx
import openai
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from llmevo.errors import ProposerError, ProposerRefused
from llmevo.prompting import Prompt
from llmevo.prompting.question import writable
from llmevo.proposers.base import Connection, Reply
from llmevo.proposers.bounds import PLAIN, bounded

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
    "max_completion_tokens": ("max_completion_tokens",),
    "max_tokens": ("max_tokens",),
    "seed": ("seed",),
}
"""How a refusal names the option it is about."""

OTHERWISE = {"max_completion_tokens": "max_tokens"}
"""What older servers call an option."""

LETTERS = 4
"""Letters a token, roughly: for servers that do not count."""

LONGEST_WAIT = 60.0
"""Seconds to wait at most for a server that says when to come back."""


class OpenAIProposer:
    """A chat model behind the official client."""

    style = "chat"

    def __init__(self, connection: Connection) -> None:
        """Raises ProposerRefused without a key for OpenAI's own server; a server of one's own may need none."""
        if not connection.api_key and not connection.base_url:
            raise ProposerRefused(
                "llm: there is no API key; set OPENAI_API_KEY or give --api-key, name your own server with --base-url,"
                " or use a model on this machine with `llm: {proposer: local}`"
            )
        if connection.api_key and not (connection.api_key.isascii() and connection.api_key.isprintable()):
            raise ProposerRefused("llm: the API key holds characters that no key has; copy it again")
        self._connection = connection
        self.model = connection.model or DEFAULT_MODEL
        # Of openai 2 and 3 alike: both take httpx's client, though only the types of 2 say so.
        hooks = {"response": [bounded(connection.timeout)]}
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
        self._options: dict[str, Any] = {"max_completion_tokens": connection.max_tokens, "seed": None}
        if connection.temperature is not None:
            self._options["temperature"] = connection.temperature
        self._with_schema = True
        self._lost = False

    def check(self) -> None:
        try:
            self._client.models.list()
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._refused(error) from None
        except openai.APIConnectionError as error:
            raise ProposerRefused(
                f"llm: no server answers at {self._client.base_url} ({self._hidden(error)}); check --base-url"
            ) from None
        except (openai.OpenAIError, ValueError, AttributeError, TypeError):
            pass  # a server without a list of models may still answer

    def answer(self, prompt: Prompt) -> Reply:
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
            completion = attempts(self._complete, prompt, problems)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise self._refused(error) from None
        except (openai.OpenAIError, ValueError) as error:  # a ValueError for what should be JSON and is not
            raise ProposerError(f"{self._client.base_url}: {self._hidden(error)}") from None
        try:
            reply = self._reply(prompt, completion, problems)
            self._lost = False
            return reply
        except (AttributeError, TypeError):  # JSON, or a page, of another kind
            text = self._hidden(ValueError(completion))
            raise ProposerError(f"{self._client.base_url} sent no chat completion ({text}); check --base-url") from None

    def _complete(self, prompt: Prompt, problems: list[str]) -> Any:
        """One request. An option that the server refuses is left out and the request repeated.

        An option that the refusal names is left out ever after, or called what older servers call it; a schema also
        when the refusal names nothing, but then for this request only: the fault may lie elsewhere.
        """
        options: dict[str, Any] = {
            name: prompt.seed if name == "seed" else value for name, value in self._options.items()
        }
        if self._with_schema and prompt.schema:
            schema = {"name": "Answer", "schema": prompt.schema, "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        while True:
            try:
                return self._client.chat.completions.create(
                    model=self.model,
                    messages=cast(Any, prompt.messages),
                    **options,
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                named = next((name for name in options if any(word in str(error) for word in SAID_OF[name])), None)
                refused = named or ("response_format" if "response_format" in options else None)
                if refused is None:
                    raise
                problems.append(
                    f"the server refused a request with {refused}; asked without it ({self._hidden(error)})"
                )
                value, other = options.pop(refused), OTHERWISE.get(refused)
                if other:
                    options[other] = value
                if named:
                    self._options = {name: options[name] for name in options if name != "response_format"}
                    self._with_schema = self._with_schema and named != "response_format"

    def _reply(self, prompt: Prompt, completion: Any, problems: list[str]) -> Reply:
        choice = next(iter(completion.choices), None)
        text = writable((choice.message.content if choice else None) or "")
        if choice and choice.finish_reason == "length":
            problems.append(f"the answer was cut at {self._connection.max_tokens} tokens; raise llm.max_tokens")
        usage = completion.usage
        read = sum(len(message["content"]) for message in prompt.messages)
        spent = (usage.prompt_tokens, usage.completion_tokens) if usage else (read // LETTERS, len(text) // LETTERS)
        if not usage:
            problems.append("the server counts no tokens; they are estimated from the texts' lengths")
        cost = sum(tokens * price for tokens, price in zip(spent, self._connection.price, strict=True)) / 1e6
        return Reply(text, completion.model or self.model, *spent, cost, tuple(problems))

    def _refused(self, error: openai.OpenAIError) -> ProposerRefused:
        return ProposerRefused(
            f"llm: {self._client.base_url} refuses ({self._hidden(error)}); check the API key, --base-url and --model"
            f" {self.model}"
        )

    def _reason(self, state: RetryCallState) -> str:
        error = state.outcome.exception() if state.outcome else None
        return f"retried after {self._hidden(error)}"

    def _hidden(self, error: BaseException | None) -> str:
        """An error's text, without the key: servers like to repeat it."""
        text, key = f"{type(error).__name__}: {error}", self._connection.api_key
        return (text.replace(key, "***") if key else text)[:300]  # cut last, or half a key could stay


def _wait(state: RetryCallState) -> float:
    """As long as the server asks for; else random, growing from 1 to 20 seconds."""
    error = state.outcome.exception() if state.outcome else None
    headers: Mapping[str, str] = error.response.headers if isinstance(error, openai.APIStatusError) else {}
    try:
        return min(max(0.0, float(headers["retry-after"])), LONGEST_WAIT)
    except (KeyError, ValueError):
        return wait_random_exponential(multiplier=1, max=20)(state)
