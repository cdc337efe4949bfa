"""lm-eval's requests, answered by a transformers model: what belongs together is computed together.

The choices of a multiple-choice item share their context, and items share solved examples: texts run through the model
as trees in which each token sees its own text only. Logits are computed only where a token is scored.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from transformers import StoppingCriteriaList

from llmevo.engines.scoring.backbone import Backbone, BatchTensors
from llmevo.engines.scoring.base import TokenScorer, remembered
from llmevo.engines.scoring.generation import StopRows, StopStrings, continue_greedily, is_plain, padded_left
from llmevo.engines.scoring.packing import Batch, Encoded, filled, packed_batches, stem_groups
from llmevo.engines.scoring.probing import allowed

DEFAULT_NEW_TOKENS = 256
"""Tokens generated when the task names no limit, as in lm-eval."""


CPU_BATCH, GPU_BATCH = 1024, 16384
"""Tokens a batch, padding included. A processor is fastest while a batch stays in its cache."""


GENERATED_BATCH = 8192
"""The same for generation, with the tokens still to come: a step costs about the same for few rows as for many."""


KEPT_TOKENS = 1 << 22
"""Tokens whose layout in batches is remembered, about 100 MB."""


Asked = tuple[tuple[str, str], list[int], list[int]]


class RequestScorer(TokenScorer):
    """The lm-eval model over a live transformers model. Weights may change between calls; nothing of them is kept.

    Equal requests are computed in equal batches, whatever was asked before, so that equal weights get equal scores to
    the last bit. How requests are laid out in batches is remembered, since every candidate is asked the same.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        TemplateLM.__init__(self)
        self.model, self.tokenizer = model, tokenizer
        text = model.config.get_text_config()  # a model of images and text has a config of each
        self.max_length: int = getattr(text, "max_position_embeddings", None) or 2048
        self._reach = _reach(model, self.max_length)
        self._tokens = remembered(self._encode)
        self._backbone = Backbone(model)
        self._layouts: dict[Any, list[BatchTensors]] = {}
        self._room = KEPT_TOKENS
        self._batch = CPU_BATCH if model.device.type == "cpu" else GPU_BATCH
        self.packs, self.stems = allowed(self._tried, text.vocab_size)

    # Log-likelihoods

    def _loglikelihood_tokens(self, requests: list[Asked], **_: Any) -> list[tuple[float, bool]]:
        return self._scores(self._layout(requests), len(requests))

    @torch.inference_mode()
    def _scores(self, layout: Sequence[BatchTensors], count: int) -> list[tuple[float, bool]]:
        scores, greedy = [0.0] * count, [True] * count
        stems, stem = list[list[int]](), None
        for inputs in layout:
            if inputs.stems is not stems:
                stems = inputs.stems
                stem = self._backbone.stem(stems, self.eot_token_id) if stems else None
            for place, gained, best in self._backbone.answers(inputs, stem):
                scores[place] += gained
                greedy[place] = greedy[place] and best
        return [*zip(scores, greedy, strict=True)]

    def _tried(self, batches: list[Batch]) -> list[float]:
        asked = {place for batch in batches for row in batch.rows for _, _, place in row.asked}
        return [
            score
            for score, _ in self._scores([BatchTensors.of(batch, self.eot_token_id) for batch in batches], len(asked))
        ]

    def _layout(self, requests: list[Asked]) -> list[BatchTensors]:
        """The requests in batches, remembered by their tokens."""
        key = self.packs, self.stems, tuple((tuple(context), tuple(rest)) for _, context, rest in requests)
        layout = self._layouts.get(key)
        if layout is None:
            encoded = [self._fitted(place, context, rest) for place, (_, context, rest) in enumerate(requests)]
            batches = packed_batches(encoded, self.packs, self.stems, self._reach, self._batch)
            layout = [BatchTensors.of(batch, self.eot_token_id) for batch in batches]
            size = sum(len(context) + len(rest) for _, context, rest in requests)
            if size <= self._room:
                self._layouts[key] = layout
                self._room -= size
        return layout

    # Generation

    @torch.inference_mode()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        texts = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(place)
        for places in kinds.values():
            options: dict[str, Any] = dict(normalize_gen_kwargs(requests[places[0]].args[1], DEFAULT_NEW_TOKENS))
            room = options.pop("max_gen_toks")
            stops = handle_stop_sequences(options.pop("until"), eos=self.tokenizer.decode(self.eot_token_id))
            kept = max(1, self.max_length - room)
            encoded = [Encoded(place, self.tok_encode(requests[place].args[0])[-kept:], []) for place in places]
            for request, made in self._continued(encoded, room, stops, options):
                text = self.tokenizer.decode(made, skip_special_tokens=True)
                texts[request.place] = postprocess_generated_text(text, stops, None)
        return texts

    def _continued(
        self, requests: list[Encoded], room: int, stops: list[str], options: dict[str, Any]
    ) -> Iterator[tuple[Encoded, list[int]]]:
        """Each context with the tokens that follow it."""
        stopped = StopStrings(self.tokenizer, stops)
        greedy = self._greedy(options)
        ordered = sorted(requests, key=lambda request: request.context)
        for stem, members in stem_groups(ordered, self._reach - room if greedy and self.stems else 0):
            for batch in generated_batches(members, room, even=not greedy):
                rows = [request.context[len(stem) :] for request in batch]
                if greedy:
                    made = continue_greedily(self._backbone, stem, rows, room, self._ends(), stopped)
                else:
                    made = self._by_transformers(rows, room, stopped, options)
                yield from zip(batch, made, strict=True)

    def _greedy(self, options: dict[str, Any]) -> bool:
        """Whether the likeliest token is all that is asked for, in batches of ours."""
        return self.packs and not options.get("do_sample") and is_plain(self.model.generation_config)

    def _by_transformers(
        self, rows: list[list[int]], room: int, stopped: StopStrings, options: dict[str, Any]
    ) -> list[list[int]]:
        """Sampling, penalties and whatever else a model's generation config asks for. Rows are equally long.

        Padding would count as text to a penalty, and to some models.
        """
        tokens, mask = padded_left(rows, self.eot_token_id, self.model.device)
        if not options.get("do_sample"):
            options = {key: value for key, value in options.items() if key != "temperature"}
        made = self.model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=room,
            pad_token_id=self.eot_token_id,
            eos_token_id=self._ends(),
            stopping_criteria=StoppingCriteriaList([StopRows(stopped, tokens.shape[1])]),
            **options,
        )
        return made[:, tokens.shape[1] :].tolist()

    def _ends(self) -> list[int]:
        """The tokens that end a text: the tokenizer's, and those the model names besides, such as the end of a turn."""
        named: Any = getattr(self.model.generation_config, "eos_token_id", None)
        return [*dict.fromkeys([self.eot_token_id, *(named if isinstance(named, list) else [named] if named else [])])]


def generated_batches(requests: Sequence[Encoded], room: int, even: bool) -> Iterator[list[Encoded]]:
    """Requests in batches by context, longest first; with `even`, of contexts of one length."""
    ordered = sorted(requests, key=lambda request: -len(request.context))
    for _, some in groupby(ordered, lambda request: len(request.context) if even else 0):
        members = [*some]
        yield from filled(members, [len(request.context) + room for request in members], GENERATED_BATCH)


def _reach(model: Any, longest: int) -> int:
    """How many tokens every layer sees at once: what a mask of ours may be given for. Less with sliding windows."""
    config = model.config.get_text_config()
    spans = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min([longest, *(span for span in spans if span)])
