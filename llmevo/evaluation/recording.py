"""Models, as lm-eval sees them, that record responses and give recorded ones back: see `responses`."""

from typing import Any

from lm_eval.api.model import LM

from llmevo.errors import EngineError
from llmevo.evaluation.responses import Responses


class Recorder(LM):
    """A live model whose responses are kept."""

    def __init__(self, lm: LM) -> None:
        super().__init__()
        self._lm = lm
        self.answers: dict[str, list[Any]] = {}

    def _kept(self, kind: str, requests: list[Any]) -> list[Any]:
        found = self.answers[kind] = getattr(self._lm, kind)(requests)
        return found

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        return self._kept("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[Any]:
        return self._kept("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        return self._kept("generate_until", requests)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._lm.apply_chat_template(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        return self._lm.tokenizer_name


class Replay(LM):
    """A model that answers as another one did. Prompts are not read: a block has the same requests everywhere."""

    def __init__(self, responses: Responses) -> None:
        super().__init__()
        self._answers = responses.answers

    def _recorded(self, kind: str, requests: list[Any]) -> list[Any]:
        found = [*self._answers.get(kind, ())]
        if len(found) != len(requests):
            raise EngineError(
                f"a worker answered {len(found)} requests of the kind {kind} where this machine makes {len(requests)}"
            )
        return found

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        return self._recorded("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[Any]:
        return self._recorded("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any]) -> list[Any]:
        return self._recorded("generate_until", requests)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return "\n".join(message["content"] for message in chat_history)

    @property
    def tokenizer_name(self) -> str:
        return "replay"
