"""lm-eval's requests, answered by a live transformers model.

The choices of a multiple-choice item share their context, and items share solved examples: texts run through the model
as trees in which each token attends to its own text only. Logits are computed only for tokens that are scored.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from llmevo.engines.scoring.backbone import Backbone, BatchTensors, supported_layouts
from llmevo.engines.scoring.base import NEUTRAL, NOT_NUMBERS, Generation, TokenRequest, TokenScorer
from llmevo.engines.scoring.packing import Batch, Encoded, filled, packed_batches, stem_groups
from llmevo.errors import CandidateError

CPU_BATCH, GPU_BATCH = 1024, 16384
"""Tokens of a batch, padding included. A CPU is fastest while a batch stays in its cache."""

GENERATED_BATCH = 8192
"""Tokens of a batch in generation, new tokens included: a step costs about the same for few rows as for many."""

KEPT_TOKENS = 1 << 22
"""Tokens whose layout in batches stays in memory, about 100 MB."""

GREEDY_OPTIONS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k", "min_p"),
    *("max_length", "max_new_tokens", "use_cache", "output_attentions", "output_hidden_states", "output_scores"),
    *("transformers_version", "return_dict_in_generate", "_from_model_config"),
}
"""Options of a model's generation config or of a task that have no effect on greedy decoding."""


class HfScorer(TokenScorer):
    """The lm-eval model over a live transformers model. Weights may change between calls; nothing of them is kept.

    Equal requests are computed in equal batches, whatever was computed before, so equal weights get bitwise equal
    scores. Layouts of requests in batches are cached, since every candidate gets the same requests.
    """

    def __init__(self, model: Any, tokenizer: Any, seed: int = 0) -> None:
        """`seed` is for generation that samples."""
        text = model.config.get_text_config()  # a model of images and text has a config of each
        super().__init__(tokenizer, getattr(text, "max_position_embeddings", None) or 2048)
        self.model, self.seed = model, seed
        # A mask of ours must not hide what a sliding window hides: longer texts get plain rows.
        spans = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
        self._reach: int = min([self.max_length, *filter(None, spans)])
        self._backbone = Backbone(model)
        self._layouts: dict[Any, list[BatchTensors]] = {}
        self._free_tokens = KEPT_TOKENS
        self._batch = CPU_BATCH if model.device.type == "cpu" else GPU_BATCH
        self.packs, self.stems = supported_layouts(self._batch_scores, text.vocab_size)

    def read(self, tokens: Tensor) -> None:
        """Run the model on tokens (texts, length) without its head, for hooks on its layers: logits of a large
        vocabulary would take time and memory.
        """
        self._backbone.body(input_ids=tokens.to(self.model.device), use_cache=False)

    # Log-likelihoods

    def _loglikelihood_tokens(self, requests: list[TokenRequest], **_: Any) -> list[tuple[float, bool]]:
        return self._scores(self._layout(requests), len(requests))

    @torch.inference_mode()
    def _scores(self, layout: Sequence[BatchTensors], count: int) -> list[tuple[float, bool]]:
        scores, greedy = [0.0] * count, [True] * count
        stems, stem = list[list[int]](), None
        for inputs in layout:
            if inputs.stems is not stems:
                stems = inputs.stems
                stem = self._backbone.stem(stems, self.eot_token_id) if stems else None
            for place, logprob, best in self._backbone.answers(inputs, stem):
                scores[place] += logprob
                greedy[place] = greedy[place] and best
        return [*zip(scores, greedy, strict=True)]

    def _batch_scores(self, batch: Batch) -> list[float]:
        """The log-likelihoods of all requests of one batch."""
        count = len({place for row in batch.rows for _, _, place in row.asked})
        return [score for score, _ in self._scores([BatchTensors.of(batch, self.eot_token_id)], count)]

    def _layout(self, requests: list[TokenRequest]) -> list[BatchTensors]:
        """The requests in batches, cached by their tokens."""
        key = self.packs, self.stems, tuple((tuple(context), tuple(rest)) for _, context, rest in requests)
        layout = self._layouts.get(key)
        if layout is None:
            batches = packed_batches(self._encoded(requests), self.packs, self.stems, self._reach, self._batch)
            layout = [BatchTensors.of(batch, self.eot_token_id) for batch in batches]
            size = sum(len(context) + len(rest) for _, context, rest in requests)
            if size <= self._free_tokens:
                self._layouts[key] = layout
                self._free_tokens -= size
        return layout

    # Generation

    @torch.inference_mode()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        texts = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(place)
        for places in kinds.values():
            asked = Generation.of(requests[places[0]].args[1])
            stops = handle_stop_sequences(asked.until, eos=self.tokenizer.decode(self.eot_token_id))
            encoded = [Encoded(place, self.prompt(requests[place].args[0], asked.room), []) for place in places]
            for request, tokens in self._continued(encoded, asked, stops):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                texts[request.place] = postprocess_generated_text(text, stops, None)
        return texts

    def _continued(
        self, requests: list[Encoded], asked: Generation, stops: list[str]
    ) -> Iterator[tuple[Encoded, list[int]]]:
        """Each context with its new tokens."""
        stopped, room = StopStrings(self.tokenizer, stops), asked.room
        given: Mapping[str, Any] = {**self.model.generation_config.to_diff_dict(), **asked.options}
        greedy = self.packs and not asked.sampled and _is_greedy(given)
        ordered = sorted(requests, key=lambda request: request.context)
        for stem, members in stem_groups(ordered, self._reach - room if greedy and self.stems else 0):
            for number, batch in enumerate(_generation_batches(members, room, even=not greedy)):
                rows = [request.context[len(stem) :] for request in batch]
                if greedy:
                    made = _continue_greedily(self._backbone, stem, rows, room, self._ends(), stopped)
                else:
                    with self._seeded(number, rows):
                        made = self._by_transformers(rows, asked, stopped)
                yield from zip(batch, made, strict=True)

    @contextmanager
    def _seeded(self, number: int, rows: list[list[int]]) -> Generator[None]:
        """Let equal texts be continued by equal random numbers, whatever was sampled before."""
        device = self.model.device
        key = hashlib.blake2b(repr((self.seed, number, rows)).encode(), digest_size=7).digest()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(key))
            yield

    def _by_transformers(self, rows: list[list[int]], asked: Generation, stopped: "StopStrings") -> list[list[int]]:
        """Sampling, penalties and other options of a task or of a model's generation config. Rows have equal length:
        padding would count as text to a penalty, and to some models.
        """
        tokens, mask = _padded_left(rows, self.eot_token_id, self.model.device)
        made = self.model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=asked.room,
            pad_token_id=self.eot_token_id,
            eos_token_id=self._ends(),
            logits_processor=LogitsProcessorList([_CheckNumbers()]),
            stopping_criteria=StoppingCriteriaList([_StopRows(stopped, tokens.shape[1])]),
            do_sample=asked.sampled,
            **asked.options,
        )
        return made[:, tokens.shape[1] :].tolist()

    def _ends(self) -> list[int]:
        """The tokens that end a text: the tokenizer's, and the model's own, such as the end of a turn."""
        own: Any = getattr(self.model.generation_config, "eos_token_id", None)
        return [*dict.fromkeys([self.eot_token_id, *(own if isinstance(own, list) else [own] if own else [])])]


def _is_greedy(options: Mapping[str, Any]) -> bool:
    """True if options leave greedy decoding as it is: no penalties, no beams."""
    return all(key in GREEDY_OPTIONS or value in (None, False, NEUTRAL.get(key)) for key, value in options.items())


def _generation_batches(requests: Sequence[Encoded], room: int, even: bool) -> Iterator[list[Encoded]]:
    """Requests in batches, longest context first; with `even`, of contexts of one length."""
    ordered = sorted(requests, key=lambda request: -len(request.context))
    for _, some in groupby(ordered, lambda request: len(request.context) if even else 0):
        members = [*some]
        yield from filled(members, [len(request.context) + room for request in members], GENERATED_BATCH)


class StopStrings:
    """Tests if generated tokens end with a stop string, whatever tokens make it up."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        # A stop string of n bytes lies within the last n tokens, or the newest token would not complete it. One more:
        # some tokenizers drop the space that a text begins with.
        self.window = max([len(stop.encode()) for stop in self.stops], default=0) + 1

    def __call__(self, tokens: Sequence[int]) -> bool:
        if not self.stops:
            return False
        text = self.tokenizer.decode(tokens[-self.window :])
        return any(stop in text for stop in self.stops)


class _StopRows(StoppingCriteria):
    """Stop strings for transformers' own generation, row by row; new tokens begin at `start`."""

    def __init__(self, stopped: StopStrings, start: int) -> None:
        self.stopped, self.start = stopped, start

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        rows = input_ids[:, self.start :].tolist()
        return torch.tensor([self.stopped(row) for row in rows], device=input_ids.device, dtype=torch.bool)


class _CheckNumbers(LogitsProcessor):
    """Raises CandidateError in transformers' own generation where a logit is NaN."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if bool(scores.isnan().any()):
            raise CandidateError(NOT_NUMBERS)
        return scores


def _padded_left(rows: Sequence[list[int]], padding: int, device: Any) -> tuple[Tensor, Tensor]:
    """Tokens and mask, (rows, longest) each."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[padding] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return tokens, mask


def _continue_greedily(
    backbone: Backbone,
    stem: list[int],
    rows: Sequence[list[int]],
    room: int,
    ends: Sequence[int],
    stopped: Callable[[Sequence[int]], bool],
) -> list[list[int]]:
    """The likeliest tokens after `stem` and each row, until `room` tokens, one of `ends` or a stop string. Raises
    CandidateError where a logit is NaN.

    A finished row leaves the batch. Texts longer than a sliding window must come without a stem: the padding between
    stem and row would count as distance.
    """
    device = backbone.model.device
    tokens, mask = _padded_left(rows, ends[0], device)
    positions = (mask.cumsum(1) - 1).clamp(min=0) + len(stem)
    if stem:
        cache: Any = DynamicCache()
        cache.layers = backbone.stem([stem], ends[0]).layers
        cache.batch_repeat_interleave(len(rows))
        mask = torch.cat([mask.new_ones(len(rows), len(stem)), mask], 1)
    else:
        cache = DynamicCache(config=backbone.model.config)
    made: list[list[int]] = [[] for _ in rows]
    live = [*range(len(rows))]
    while True:
        hidden = backbone.hidden(tokens, mask, positions, cache)
        for row, token in zip(live, _likeliest(backbone.head(hidden[:, -1])), strict=True):
            made[row].append(token)
        going = [
            i
            for i, row in enumerate(live)
            if len(made[row]) < room and made[row][-1] not in ends and not stopped(made[row])
        ]
        if not going:
            return made
        if len(going) < len(live):
            live = [live[i] for i in going]
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            mask, positions = mask[kept], positions[kept]
        tokens = torch.tensor([[made[row][-1]] for row in live], device=device)
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], 1)


def _likeliest(logits: Tensor) -> list[int]:
    """The likeliest token of each row. Raises CandidateError where a logit is NaN."""
    best = logits.argmax(-1, keepdim=True)  # of a row with NaN the place of one
    tokens = best.masked_fill(logits.gather(-1, best).isnan(), -1).flatten().tolist()  # one transfer from the device
    if -1 in tokens:
        raise CandidateError(NOT_NUMBERS)
    return tokens
