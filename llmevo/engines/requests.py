"""lm-eval's requests, answered by a transformers model: what belongs together is computed together.

The choices of a multiple-choice item share their context: context and choices run through the model as one row
in which each choice sees the context and itself only. Logits are computed only where a token is scored.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from llmevo.engines.packing import Encoded, Row, packed_batches, plain_batches

LOGIT_ROWS = 256
"""Tokens scored at a time: each costs a row of logits as wide as the vocabulary."""

DEFAULT_NEW_TOKENS = 256
"""Tokens generated when the task names no limit, as in lm-eval."""


class RequestScorer(TemplateLM):
    """The lm-eval model over a live transformers model. Weights may change between calls; nothing of them is kept."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.max_length: int = getattr(model.config, "max_position_embeddings", None) or 2048
        self._reach = _reach(model, self.max_length)
        self._tokens = cache(self._encode)  # the texts are the same for every candidate
        self._backbone, self._head = _split(model)
        self.packs = self._packing_holds()

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
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        totals: list[float] = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            scored = self._loglikelihood_tokens([(("", ""), list(context), list(rest)) for context, rest in pairs])
            totals.append(sum(score for score, _ in scored))
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        encoded = [self._fitted(place, context, rest) for place, (_, context, rest) in enumerate(requests)]
        for batch in self._batches(encoded):
            for place, result in self._score(batch):
                results[place] = result
        return results

    def _batches(self, encoded: list[Encoded]) -> Iterator[list[Row]]:
        """What all layers can see at once is packed; longer texts get plain rows."""
        short = [e for e in encoded if len(e.context) + len(e.continuation) <= self._reach]
        long = [e for e in encoded if len(e.context) + len(e.continuation) > self._reach]
        yield from packed_batches(short, self.packs, self._reach)
        yield from packed_batches(long, False, self.max_length)

    def _fitted(self, place: int, context: list[int], continuation: list[int]) -> Encoded:
        """Cut from the left what the model cannot hold, as lm-eval does; the last token is never an input."""
        room = max(1, self.max_length + 1 - len(continuation))
        return Encoded(place, context[-room:], continuation[-self.max_length :])

    @torch.inference_mode()
    def _packing_holds(self) -> bool:
        """Whether packed rows give this model's own answers, tried on one made-up item.

        They do wherever attention follows the mask and places follow `position_ids`. Not with ALiBi, and not with
        recurrent layers; such models get one plain row a request.
        """
        vocabulary = self.model.config.get_text_config().vocab_size
        tokens = [(7 + 31 * i) % vocabulary for i in range(60)]
        # Twelve choices: the last one then lies so far from its context that a bias by distance cannot be missed.
        item = [Encoded(i, tokens[:12], tokens[12 + 4 * i : 16 + 4 * i]) for i in range(12)]

        def scores(pack: bool) -> list[float]:
            return [
                score for rows in packed_batches(item, pack, self.max_length) for _, (score, _) in self._score(rows)
            ]

        plain = scores(False)
        try:
            packed = scores(True)
        except Exception:  # anybody's model code, given a mask of a shape it may not know
            return False
        return all(abs(one - other) <= 0.02 * abs(one) + 0.05 for one, other in zip(plain, packed, strict=True))

    def _score(self, batch: list[Row]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Log-likelihood and greediness of every request of a batch, in one pass through the model."""
        device = self.model.device
        length = max(len(row.tokens) for row in batch)
        tokens = torch.full((len(batch), length), self.eot_token_id)
        positions = torch.zeros_like(tokens)
        for place, row in enumerate(batch):
            tokens[place, : len(row.tokens)] = torch.tensor(row.tokens)
            positions[place, : len(row.tokens)] = torch.tensor(row.positions)
        branching = any(len(row.requests) > 1 for row in batch)
        mask = _branching_mask(batch, length, self.model.dtype) if branching else _plain_mask(batch, length)
        inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask}
        hidden = self._backbone(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False)[0]
        wanted = torch.tensor([(i, at) for i, row in enumerate(batch) for at in row.predicts], device=device)
        targets = torch.tensor([token for row in batch for token in row.targets], device=device)
        gained, greedy = self._look_up(hidden[wanted[:, 0], wanted[:, 1]], targets)
        start = 0
        for row in batch:
            for request in row.requests:
                here = slice(start, start + len(request.continuation))
                yield request.place, (float(gained[here].sum()), bool(greedy[here].all()))
                start = here.stop

    def _look_up(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The log-probability of each target, and whether it is the likeliest token; a few rows of logits at a time."""
        gained, greedy = torch.empty(len(targets)), torch.empty(len(targets), dtype=torch.bool)
        for start in range(0, len(targets), LOGIT_ROWS):
            here = slice(start, start + LOGIT_ROWS)
            logits = self._head(hidden[here]).float()
            chosen = logits.gather(1, targets[here].unsqueeze(1)).squeeze(1)
            gained[here] = (chosen - logits.logsumexp(1)).cpu()
            greedy[here] = (logits.argmax(1) == targets[here]).cpu()
        return gained, greedy

    @torch.inference_mode()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        texts = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(place)
        for places in kinds.values():
            options: dict[str, Any] = dict(requests[places[0]].args[1])
            encoded = [Encoded(place, self.tok_encode(requests[place].args[0]), []) for place in places]
            for batch in plain_batches(encoded):
                contexts = [request.context for request in batch]
                for request, text in zip(batch, self._generate(contexts, options), strict=True):
                    texts[request.place] = text
        return texts

    def _generate(self, contexts: list[list[int]], options: dict[str, Any]) -> list[str]:
        """Continue each context until one of its stop strings, which is cut off."""
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else [*until]
        room = int(options.get("max_gen_toks") or options.get("max_new_tokens") or DEFAULT_NEW_TOKENS)
        sampled = bool(options.get("do_sample")) or float(options.get("temperature") or 0.0) > 0
        config = GenerationConfig(
            max_new_tokens=room,
            do_sample=sampled,
            pad_token_id=self.eot_token_id,
            eos_token_id=self._ends(),
            **({key: options[key] for key in ("temperature", "top_p", "top_k") if key in options} if sampled else {}),
        )
        kept = max(1, self.max_length - room)
        rows = [context[-kept:] for context in contexts]
        longest = max(len(row) for row in rows)
        tokens = torch.tensor([[self.eot_token_id] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        criteria = StoppingCriteriaList([_StopStrings(self.tokenizer, stops, tokens.shape[1])])
        out: Tensor = self.model.generate(
            input_ids=tokens.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            generation_config=config,
            stopping_criteria=criteria,
        )
        texts = self.tokenizer.batch_decode(out[:, tokens.shape[1] :], skip_special_tokens=True)
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _ends(self) -> list[int]:
        """The tokens that end a text: the tokenizer's, and those the model names besides, such as the end of a turn."""
        named: Any = getattr(self.model.generation_config, "eos_token_id", None)
        return [*dict.fromkeys([self.eot_token_id, *(named if isinstance(named, list) else [named] if named else [])])]


class _StopStrings(StoppingCriteria):
    """Ends each row on its own as soon as a stop string stands in what was generated."""

    def __init__(self, tokenizer: Any, stops: list[str], start: int) -> None:
        self.tokenizer, self.stops, self.start = tokenizer, stops, start
        # A stop string of n characters lies within the last n tokens, or the newest token would not complete it.
        self.window = max([len(stop) for stop in stops], default=0) + 1

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        recent = input_ids[:, max(self.start, input_ids.shape[1] - self.window) :]
        texts = self.tokenizer.batch_decode(recent)
        found = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(found, device=input_ids.device, dtype=torch.bool)


def _reach(model: Any, longest: int) -> int:
    """How many tokens every layer sees at once: what a mask of ours may be given for. Less with sliding windows."""
    config = model.config.get_text_config()
    spans = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min([longest, *(span for span in spans if span)])


def _split(model: Any) -> tuple[Any, Any]:
    """The model without its output head, and the head.

    Some architectures do more to logits than multiply (scale them, cap them); they say so in their config.
    """
    backbone, head = model.base_model, model.get_output_embeddings()
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)

    def logits(hidden: Tensor) -> Tensor:
        out = head(hidden.to(head.weight.dtype))  # some keep their residual stream in float32
        out = out * scale if scale != 1.0 else out
        return torch.tanh(out / cap) * cap if cap else out

    return backbone, logits


def _plain_mask(batch: list[Row], length: int) -> Tensor:
    return torch.tensor([[1] * len(row.tokens) + [0] * (length - len(row.tokens)) for row in batch])


def _branching_mask(batch: list[Row], length: int, dtype: torch.dtype) -> Tensor:
    """(rows, 1, length, length), to be added: 0 where a token may look, the lowest number where not."""
    branches = torch.full((len(batch), length), -1)
    for place, row in enumerate(batch):
        branches[place, : len(row.branches)] = torch.tensor(row.branches)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = (branches.unsqueeze(2) == branches.unsqueeze(1)) | (branches.unsqueeze(1) == 0)
    return torch.zeros(len(batch), 1, length, length, dtype=dtype).masked_fill_(
        ~(same & causal).unsqueeze(1), torch.finfo(dtype).min
    )
