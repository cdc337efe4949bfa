"""A transformers model without its output head: logits are computed only for the tokens that are scored."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from llmevo.engines.scoring.packing import Batch, Encoded, Row

HEAD_ROWS = 256
"""Tokens whose logits are in memory at a time: each is a row as wide as the vocabulary."""

PIECE = {"cpu": 1 << 20}
"""Logits reduced at a time, in float32: as many as fit in a CPU's cache. A GPU takes them all."""


class Stem(DynamicCache):
    """Keys and values of shared prefixes, one for all rows of a batch or one for each row; rows do not change them."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of stem and rows in a layer, (rows, heads, stem + length, width) each."""
        held: Any = self.layers[layer_idx]
        keys: Tensor = held.keys.expand(len(key_states), -1, -1, -1)
        values: Tensor = held.values.expand(len(value_states), -1, -1, -1)
        return torch.cat([keys, key_states], -2), torch.cat([values, value_states], -2)


@dataclass(frozen=True)
class BatchTensors:
    """A batch in tensors."""

    stems: list[list[int]]
    tokens: Tensor
    """(rows, length), like the next two."""
    positions: Tensor
    ends: Tensor
    """As in a Row; padding sees itself."""
    masked: bool
    heads: Tensor
    """(tokens with logits, 2): the row of each and its place in the row."""
    bounds: list[int]
    """The start of the targets of each of `heads`, and the end."""
    targets: Tensor
    places: list[int]
    """The request of each target."""

    @classmethod
    def of(cls, batch: Batch, padding: int) -> "BatchTensors":
        """Tokens with targets of several requests get one row of logits."""
        length = max(len(row.tokens) for row in batch.rows)
        tokens = torch.full((len(batch.rows), length), padding)
        positions = torch.zeros_like(tokens)
        ends = torch.arange(1, length + 1).repeat(len(batch.rows), 1)
        asked: list[tuple[int, int, int, int]] = []
        for place, row in enumerate(batch.rows):
            for made, given in ((tokens, row.tokens), (positions, row.positions), (ends, row.ends)):
                made[place, : len(given)] = torch.tensor(given)
            asked += [(place, *one) for one in row.asked]
        asked.sort(key=lambda one: one[:2])
        starts: dict[tuple[int, int], int] = {}
        for at, (row, node, _, _) in enumerate(asked):
            starts.setdefault((row, node), at)
        return cls(
            batch.stems,
            tokens,
            positions,
            ends,
            batch.masked,
            torch.tensor([*starts]),
            [*starts.values(), len(asked)],
            torch.tensor([target for _, _, target, _ in asked]),
            [place for _, _, _, place in asked],
        )


class Backbone:
    """A live model with its head apart."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # A class whose prefix is that of a larger model has none of its own by that name (Llama 4's text model).
        self._use(model.base_model if model.base_model is not model else getattr(model, "model", model), _head(model))
        if not self._is_the_models():  # an architecture that changes logits in a way of its own
            self._use(model, lambda logits: logits)

    def _use(self, body: Any, head: Callable[[Tensor], Tensor]) -> None:
        self.body, self.head = body, head
        # Newer transformers call the argument `cache`.
        self._cache = "cache" if "cache" in signature(body.forward).parameters else "past_key_values"

    @torch.inference_mode()
    def _is_the_models(self) -> bool:
        """Return whether the logits are those that the model itself computes."""
        tokens = torch.arange(4, 12, device=self.model.device).unsqueeze(0)
        own = self.model(input_ids=tokens, use_cache=False).logits.float()
        try:
            found = self.head(self.hidden(tokens, torch.ones_like(tokens), tokens - 4)).float()
        except (RuntimeError, TypeError):  # what was taken for its body is something else
            return False
        # Weights that are not finite are told elsewhere.
        return found.shape == own.shape and not bool(((found - own).abs() > 0.02 * (own.abs() + own.std())).any())

    def stem(self, stems: Sequence[list[int]], padding: int) -> Stem:
        """The keys and values of shared prefixes."""
        longest = max(map(len, stems))
        padded = [[*stem, *[padding] * (longest - len(stem))] for stem in stems]
        tokens = torch.tensor(padded, device=self.model.device)
        positions = torch.arange(longest, device=self.model.device).expand(len(stems), -1)
        grown = DynamicCache()
        self.hidden(tokens, torch.ones_like(tokens), positions, grown)
        cache = Stem()
        cache.layers = grown.layers
        return cache

    def hidden(self, tokens: Tensor, mask: Tensor | None, positions: Tensor, cache: Any = None) -> Tensor:
        """(rows, length, width) before the head. `cache` holds the keys and values before the rows."""
        given: dict[str, Any] = {"use_cache": False} if cache is None else {"use_cache": True, self._cache: cache}
        return self.body(input_ids=tokens, attention_mask=mask, position_ids=positions, **given)[0]

    def answers(self, inputs: BatchTensors, stem: Stem | None) -> Iterator[tuple[int, float, bool]]:
        """(request, log-probability of one of its tokens, True if that is the likeliest token), in one pass."""
        device, dtype = self.model.device, self.model.dtype
        tokens, positions, ends = (each.to(device) for each in (inputs.tokens, inputs.positions, inputs.ends))
        before = torch.tensor([len(one) for one in inputs.stems] or [0], device=device)
        mask = tree_mask(ends, before, dtype) if inputs.masked else (ends > 0).long()
        hidden = self.hidden(tokens, mask, positions, stem)
        heads, targets = inputs.heads.to(device), inputs.targets.to(device)
        rows = hidden[heads[:, 0], heads[:, 1]]
        found = [self._look_up(rows, inputs.bounds, targets, start) for start in range(0, len(rows), HEAD_ROWS)]
        logprobs = torch.cat([one for one, _ in found]).tolist()
        greedy = torch.cat([other for _, other in found]).tolist()
        yield from zip(inputs.places, logprobs, greedy, strict=True)

    def _look_up(self, rows: Tensor, bounds: list[int], targets: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The log-probabilities of the targets of `HEAD_ROWS` rows, and which of them are the likeliest tokens."""
        logits = self.head(rows[start : start + HEAD_ROWS])
        size = max(1, PIECE.get(logits.device.type, logits.numel()) // logits.shape[1])
        logprobs: list[Tensor] = []
        greedy: list[Tensor] = []
        for at in range(0, len(logits), size):
            values = logits[at : at + size].float()
            first, last = start + at, start + at + len(values)
            own = torch.repeat_interleave(
                torch.tensor([bounds[i + 1] - bounds[i] for i in range(first, last)], device=values.device)
            )
            wanted = targets[bounds[first] : bounds[last]]
            top = values.amax(1)
            chosen = values[own, wanted]
            best = chosen == top[own]
            if bool(best.any()):  # of equally likely tokens the first one is the model's choice
                best[best.clone()] = values[own[best]].argmax(1) == wanted[best]
            total = (values - top.unsqueeze(1)).exp_().sum(1).log_() + top
            logprobs.append(chosen - total[own])
            greedy.append(best)
        return torch.cat(logprobs), torch.cat(greedy)


def tree_mask(ends: Tensor, before: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, 1, length, stem + length), an additive mask: 0 where a token attends, else the lowest number.

    A token sees its stem, its ancestors and itself. `before` are the lengths of the stems, one for all rows or one
    each; the mask is as wide as the longest.
    """
    places = torch.arange(ends.shape[1], device=ends.device)
    own = (places.unsqueeze(1) >= places) & (places.unsqueeze(1) < ends.unsqueeze(1))
    stem = torch.arange(int(before.max()), device=ends.device) < before.view(-1, 1, 1)
    sees = torch.cat([stem.expand(*ends.shape, -1), own], 2)
    mask = torch.zeros(sees.shape, dtype=dtype, device=ends.device)
    return mask.masked_fill_(~sees, torch.finfo(dtype).min).unsqueeze(1)


def _head(model: Any) -> Any:
    """The output head. Some architectures also scale or cap logits, as their config says."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)

    def logits(hidden: Tensor) -> Tensor:
        out = head(hidden.to(head.weight.dtype))  # some keep their residual stream in float32
        out = out * scale if scale != 1.0 else out
        return torch.tanh(out / cap) * cap if cap else out

    return logits


def supported_layouts(scores: Callable[[Batch], list[float]], vocabulary: int) -> tuple[bool, bool]:
    """Return if trees, and if stems before them, give the model's own answers; `scores` computes one batch.

    They do if attention follows the mask and positions follow `position_ids`: not with ALiBi, and not with recurrent
    layers. Such models get one plain row for each text.
    """
    tokens = [(7 + 31 * i) % vocabulary for i in range(60)]
    # Twelve choices: the last one is so far from its context that a bias by distance shows.
    requests = [Encoded(i, tokens[:12], tokens[12 + 4 * i : 16 + 4 * i]) for i in range(12)]
    plain = scores(Batch([], [Row.of([request]) for request in requests], masked=False))

    def agrees(batch: Batch) -> bool:
        try:
            found = scores(batch)
        except Exception:  # any model's code, given a mask or a cache of a shape that it may not support
            return False
        return all(abs(one - other) <= 0.02 * abs(one) + 0.05 for one, other in zip(plain, found, strict=True))

    if not agrees(Batch([], [Row.of(requests)], masked=True)):
        return False, False
    halves = [Row.of(requests[:7], stem=8), Row.of(requests[7:], stem=8)]
    return True, agrees(Batch([tokens[:8]], halves, masked=True))
