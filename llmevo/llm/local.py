"""A causal language model on this machine whose decoding is restricted to integers.

Any model works, also a small base model: it continues a pattern, and only digits can be generated, so every answer can
be read.
"""

import copy
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmevo.errors import ProposerRefused
from llmevo.llm.client import Connection, Reply, Request

TEMPERATURE = 0.8


class LocalClient:
    """A transformers model, in memory only while it answers."""

    style = "completion"

    def __init__(self, connection: Connection) -> None:
        if not connection.model:
            raise ProposerRefused("llm.model: the local proposer needs a model reference")
        self.model = connection.model
        self._connection = connection

    def check(self) -> None:
        _digits(self._read(AutoTokenizer))

    def _read(self, kind: Any, **options: Any) -> Any:
        try:
            return kind.from_pretrained(self._connection.folder or self.model, **options)
        except Exception as error:  # a damaged file raises whatever its reader raises
            if isinstance(error, MemoryError | torch.OutOfMemoryError):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ProposerRefused(f"llm.model: transformers cannot load {self.model} ({reason})") from error

    def _load(self) -> tuple[Any, Any]:
        """Load the model for each request: that takes a second, and the memory is free while candidates are scored."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = self._read(AutoModelForCausalLM, dtype=torch.bfloat16)
        return model.to(device).eval(), self._read(AutoTokenizer)

    @torch.inference_mode()
    def answer(self, request: Request) -> Reply:
        """Answer with `samples` lines of `integers` numbers of `digits` digits."""
        model, tokenizer = self._load()
        random = torch.Generator().manual_seed(request.seed)
        temperature = TEMPERATURE if self._connection.temperature is None else self._connection.temperature
        digits = _digits(tokenizer)
        space = tokenizer.encode(" ", add_special_tokens=False)
        needed = request.integers * (request.digits + 1)
        tokens = _prompt_tokens(tokenizer, request.messages[-1]["content"], model.config, needed)
        inputs = torch.tensor([tokens + space], device=model.device)
        name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"  # in older versions
        out = model(input_ids=inputs, use_cache=True, logits_to_keep=1)
        cache = copy.copy(out[name])
        cache.batch_repeat_interleave(request.samples)
        logits: Tensor = out.logits[:, -1].expand(request.samples, -1)
        drawn: list[Tensor] = []
        last = request.integers * request.digits
        for place in range(1, last + 1):
            digit = _draw(logits[:, digits], temperature, random)
            drawn.append(digit)
            if place == last:
                break
            # The spaces between the numbers are given; they are read with the digit before them.
            step = torch.tensor(digits, device=model.device)[digit].unsqueeze(1)
            if place % request.digits == 0:
                step = torch.cat([step, torch.tensor([space], device=model.device).expand(request.samples, -1)], dim=1)
            out = model(input_ids=step, use_cache=True, logits_to_keep=1, **{name: cache})
            cache, logits = out[name], out.logits[:, -1]
        text = "\n".join(_lines(torch.stack(drawn, dim=1), request.digits))
        return Reply(text, self.model, len(tokens), request.samples * last)


def _digits(tokenizer: Any) -> list[int]:
    """Return the tokens of 0 to 9. Raises ProposerRefused for a vocabulary without single digits."""
    tokens = [tokenizer.encode(str(digit), add_special_tokens=False)[-1:] for digit in range(10)]
    found = [ids[0] for ids in tokens if ids and tokenizer.decode(ids).strip().isdigit()]
    if len(set(found)) != 10:
        raise ProposerRefused("llm.model: its vocabulary has no tokens for single digits; use another model")
    return found


def _prompt_tokens(tokenizer: Any, text: str, config: Any, needed: int) -> list[int]:
    """Return the prompt, without its first (worst) lines if the context has no room for `needed` more tokens."""
    tokens = tokenizer.encode(text)
    limit: int = getattr(config.get_text_config(), "max_position_embeddings", None) or 2048
    return tokens[-max(limit // 4, limit - needed) :]


def _draw(logits: Tensor, temperature: float, random: torch.Generator) -> Tensor:
    """Draw one of the ten digits for every sample."""
    if temperature <= 0:
        return logits.argmax(-1)
    weights = (logits.float().cpu() / temperature).softmax(-1)
    return torch.multinomial(weights, 1, generator=random).squeeze(1).to(logits.device)


def _lines(digits: Tensor, width: int) -> list[str]:
    rows = ["".join(map(str, row)) for row in digits.tolist()]
    return [" ".join(row[start : start + width] for start in range(0, len(row), width)) for row in rows]
