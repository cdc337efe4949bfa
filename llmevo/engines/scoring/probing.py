"""Which ways of computing less a model's code allows, found by trying."""

from collections.abc import Callable

from llmevo.engines.scoring.packing import Batch, Encoded, Row

Scores = Callable[[list[Batch]], list[float]]
"""Log-likelihoods of the twelve made-up requests."""


STEM = 8


def allowed(scores: Scores, vocabulary: int) -> tuple[bool, bool]:
    """Whether trees, and stems before them, give a model's own answers.

    They do wherever attention follows the mask and places follow `position_ids`. Not with ALiBi, and not with
    recurrent layers; such models get one plain row a text.
    """
    tokens = [(7 + 31 * i) % vocabulary for i in range(60)]
    # Twelve choices: the last one then lies so far from its context that a bias by distance cannot be missed.
    requests = [Encoded(i, tokens[:12], tokens[12 + 4 * i : 16 + 4 * i]) for i in range(12)]
    plain = scores([Batch([], [_row(0, [request]) for request in requests], masked=False)])
    if not _same(plain, scores, Batch([], [_row(0, requests)], masked=True)):
        return False, False
    halves = [_row(STEM, requests[:7]), _row(STEM, requests[7:])]
    return True, _same(plain, scores, Batch([tokens[:STEM]], halves, masked=True))


def _row(stem: int, requests: list[Encoded]) -> Row:
    row = Row(stem)
    for request in sorted(requests, key=lambda request: request.text):
        row.add(request)
    return row


def _same(plain: list[float], scores: Scores, batch: Batch) -> bool:
    try:
        found = scores([batch])
    except Exception:  # anybody's model code, given a mask or a cache of a shape it may not know
        return False
    return all(abs(one - other) <= 0.02 * abs(one) + 0.05 for one, other in zip(plain, found, strict=True))
