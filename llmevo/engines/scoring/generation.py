"""Generation for lm-eval: greedy continuation of many contexts at once, and transformers' own way for the rest."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria

from llmevo.engines.scoring.backbone import Backbone

PLAIN = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k", "min_p"),
    *("max_length", "max_new_tokens", "use_cache", "output_attentions", "output_hidden_states", "output_scores"),
    *("transformers_version", "return_dict_in_generate", "_from_model_config"),
}
"""What a model's generation config may name without any effect on greedy continuation."""


NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0}


def is_plain(config: Any) -> bool:
    """Whether the likeliest token is what the model's generation config asks for: no penalties, no beams."""
    named: dict[str, Any] = config.to_diff_dict()
    return all(key in PLAIN or value in (None, False, NEUTRAL.get(key)) for key, value in named.items())


class StopStrings:
    """Whether a stop string stands at the end of what was generated, whatever tokens make it up."""

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


class StopRows(StoppingCriteria):
    """The same for transformers' own generation: ends each row on its own."""

    def __init__(self, stopped: Callable[[Sequence[int]], bool], start: int) -> None:
        self.stopped, self.start = stopped, start

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        rows = input_ids[:, self.start :].tolist()
        return torch.tensor([self.stopped(row) for row in rows], device=input_ids.device, dtype=torch.bool)


def padded_left(rows: Sequence[list[int]], padding: int, device: Any) -> tuple[Tensor, Tensor]:
    """Tokens and mask, (rows, longest) each."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[padding] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return tokens, mask


def continue_greedily(
    backbone: Backbone,
    stem: list[int],
    rows: Sequence[list[int]],
    room: int,
    ends: Sequence[int],
    stopped: Callable[[Sequence[int]], bool],
) -> list[list[int]]:
    """The likeliest tokens after `stem` and each row, up to `room` of them, one of `ends` or what `stopped` says.

    A row that has ended leaves the batch. Texts that are longer than a sliding window must come without a stem: the
    padding between stem and row would count as distance.
    """
    device = backbone.model.device
    tokens, mask = padded_left(rows, ends[0], device)
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
        chosen = backbone.head(hidden[:, -1]).argmax(-1).tolist()
        for row, token in zip(live, chosen, strict=True):
            made[row].append(token)
        going = [i for i, row in enumerate(live) if not _ended(made[row], room, ends, stopped)]
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


def _ended(made: list[int], room: int, ends: Sequence[int], stopped: Callable[[Sequence[int]], bool]) -> bool:
    return len(made) >= room or made[-1] in ends or stopped(made)
