"""What lm-eval's interface asks of every engine, whatever computes the answers: texts as tokens."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmevo.engines.scoring.packing import Encoded

KEPT_CHARACTERS = 1 << 26
"""Characters of text whose tokens are remembered: about half a gigabyte."""


class TokenScorer(TemplateLM):
    """lm-eval's model interface over a tokenizer and a longest text; the answers come from a subclass."""

    tokenizer: Any
    max_length: int
    _tokens: Callable[[str, bool | None], list[int]]

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
        return [*self._tokens(string, add_special_tokens)]

    def _encode(self, string: str, add_special_tokens: bool | None) -> list[int]:
        begin = self.tokenizer.bos_token
        if add_special_tokens is None and begin and string.startswith(begin):
            add_special_tokens = False
        extra = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **extra)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text. Where the template refuses a system message (Gemma's does), its text begins the first user
        message, as Gemma's documentation has it; lm-eval leaves the message out.
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
            folded = without_system(chat_history)
            if folded == chat_history:
                raise
            return rendered(folded)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
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
        return totals

    def _fitted(self, place: int, context: list[int], continuation: list[int]) -> Encoded:
        """Cut from the left what the model cannot hold, as lm-eval does; the last token is never an input."""
        room = max(1, self.max_length + 1 - len(continuation))
        return Encoded(place, context[-room:], continuation[-self.max_length :])


def without_system(chat: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The chat with the text of its system messages at the beginning of the first user message."""
    told = "\n\n".join(message["content"].strip() for message in chat if message["role"] == "system")
    rest = [{**message} for message in chat if message["role"] != "system"]
    if not told:
        return rest
    if not rest or rest[0]["role"] != "user":
        return [{"role": "user", "content": told}, *rest]
    return [{**rest[0], "content": f"{told}\n\n{rest[0]['content']}"}, *rest[1:]]


def remembered(encode: Callable[[str, bool | None], list[int]]) -> Callable[[str, bool | None], list[int]]:
    """The same function with a memory of the first `KEPT_CHARACTERS`: every candidate is asked the same texts.

    What is in stays in. Texts come round in the same order for each candidate, and a memory that let the oldest go
    would, once too small, never hold the next one.
    """
    return partial(_remember, encode, {}, [KEPT_CHARACTERS])


def _remember(
    encode: Callable[[str, bool | None], list[int]],
    known: dict[tuple[str, bool | None], list[int]],
    room: list[int],
    string: str,
    add_special_tokens: bool | None,
) -> list[int]:
    key = string, add_special_tokens
    tokens = known.get(key)
    if tokens is None:
        tokens = encode(string, add_special_tokens)
        if len(string) <= room[0]:
            known[key] = tokens
            room[0] -= len(string)
    return tokens
