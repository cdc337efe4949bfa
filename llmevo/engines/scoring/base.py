"""The part of lm-eval's model interface that is the same for every engine: texts to tokens, chats to texts."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmevo.engines.scoring.packing import Encoded
from llmevo.errors import CandidateError, TaskError

DEFAULT_NEW_TOKENS = 256
"""Tokens to generate when a task sets no limit, as in lm-eval."""

KEPT_CHARACTERS = 1 << 26
"""Characters of text whose tokens stay in memory: about half a gigabyte."""

SHOWN = 60
"""Characters of a question in an error, its end."""

NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "use_cache": True,
}
"""Values of generation options that have no effect."""

NOT_NUMBERS = (
    "the model's outputs are not numbers (NaN); where its dtype is float16, whose numbers end at 65504, bfloat16 or"
    " float32 may help"
)
"""Why a candidate fails whose outputs cannot be compared."""

TokenRequest = tuple[tuple[str, str], list[int], list[int]]
"""lm-eval's request for a log-likelihood: (context, continuation) as texts, then each as tokens."""


@dataclass(frozen=True)
class Generation:
    """How a text is continued, as lm-eval reads a task's `generation_kwargs`."""

    room: int
    """The most new tokens."""
    until: list[str]
    """Stop strings."""
    sampled: bool
    """False for the likeliest tokens, whatever `temperature` says."""
    options: dict[str, Any]
    """Further ones that may have an effect, such as penalties, and the temperature where tokens are sampled."""

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Generation":
        options: dict[str, Any] = dict(normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS))
        room, until, sampled = (options.pop(key) for key in ("max_gen_toks", "until", "do_sample"))
        if not sampled:
            options.pop("temperature", None)
        used = {key: of for key, of in options.items() if of is not None and of is not False and of != NEUTRAL.get(key)}
        return cls(room, [stop for stop in until if stop], sampled, used)


class TokenScorer(TemplateLM):
    """lm-eval's model interface over a tokenizer; subclasses compute log-likelihoods and generate."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        """`max_length` is the longest text, in tokens, that the model reads."""
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, max_length
        self._tokens: dict[tuple[str, bool | None], list[int]] = {}
        self._free_characters = KEPT_CHARACTERS

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text. Every candidate answers the same texts, so the first `KEPT_CHARACTERS` are cached.

        Nothing is evicted: texts come in the same order for each candidate, so a full cache that evicts the oldest
        entry would never hit.
        """
        key = string, add_special_tokens
        tokens = self._tokens.get(key)
        if tokens is None:
            begin = self.tokenizer.bos_token
            if add_special_tokens is None and begin and string.startswith(begin):
                add_special_tokens = False
            options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            tokens = self.tokenizer.encode(string, **options)
            if len(string) <= self._free_characters:
                self._tokens[key] = tokens
                self._free_characters -= len(string)
        return [*tokens]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text. If the template rejects a system message (Gemma's does), its text is prepended to the first
        user message, as Gemma's documentation recommends; lm-eval drops the message.
        """

        def rendered(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return rendered(chat_history)
        except TemplateError:
            folded = _fold_system_messages(chat_history)
            if folded == chat_history:
                raise
            return rendered(folded)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Raises CandidateError where one is NaN, and TaskError for a continuation without a token."""
        found = self.likelihoods(requests)
        check_numbers(score for score, _ in found)
        return found

    def likelihoods(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """The same, with those that are NaN."""
        for context, continuation in (request.args for request in requests):
            if not context and not self.tok_encode(continuation, add_special_tokens=False):
                raise _without_token(context, continuation)  # lm-eval looks at its first token
        return super().loglikelihood(requests, disable_tqdm=True)

    def prompt(self, context: str, room: int) -> list[int]:
        """The tokens of a text to be continued by up to `room` tokens, truncated from the left to what the model holds.
        Raises TaskError where none is left.
        """
        if room >= self.max_length:
            raise TaskError(
                f"generation_kwargs: max_gen_toks: {room} leaves no token of the {self.max_length} that the model reads"
                f" for the question; give less (reply_tokens of a judge or of votes, tokens of the gate)"
            )
        tokens = self.tok_encode(context)
        if not tokens:
            raise TaskError(f"tasks: the question {context!r} has no token, so there is no text to continue")
        return tokens[room - self.max_length :]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for place, request in enumerate(requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, rest in map(make_disjoint_window, pieces):
                windows.append((("", ""), [*context], [*rest]))
                owners.append(place)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += score
        check_numbers(totals)
        return totals

    def _encoded(self, requests: Sequence[TokenRequest]) -> list[Encoded]:
        """The requests, truncated from the left to what the model holds, as lm-eval does; the last token is never an
        input. Raises TaskError for a continuation without a token, which would be certain.
        """
        encoded: list[Encoded] = []
        for place, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                raise _without_token(*texts)
            room = max(1, self.max_length + 1 - len(continuation))
            encoded.append(Encoded(place, context[-room:], continuation[-self.max_length :]))
        return encoded


def _without_token(context: str, continuation: str) -> TaskError:
    return TaskError(
        f"tasks: the answer {continuation!r} to the question {context[-SHOWN:]!r} has no token and so no likelihood;"
        " correct the question's choices, or its target"
    )


def check_numbers(logprobs: Iterable[float]) -> None:
    """Raise CandidateError where one is NaN."""
    if any(map(math.isnan, logprobs)):
        raise CandidateError(NOT_NUMBERS)


def _fold_system_messages(chat: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The chat with the text of its system messages at the start of the first user message."""
    system = "\n\n".join(message["content"].strip() for message in chat if message["role"] == "system")
    rest = [{**message} for message in chat if message["role"] != "system"]
    if not system:
        return rest
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": system}, *rest]
    return [{**rest[0], "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]
