"""How requests are laid out in rows and batches, before any tensor is made."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

BATCH_TOKENS = 4096
"""Tokens a batch, padding included."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Encoded:
    """A request in tokens."""

    place: int
    """Its place among the requests."""
    context: list[int]
    continuation: list[int]


@dataclass
class Row:
    """One row of a batch: a context, and the continuations that branch off it.

    The last token of a continuation predicts nothing and is left out.
    """

    context: list[int]
    tokens: list[int] = field(init=False)
    positions: list[int] = field(init=False)
    """The place of each token in its own text."""
    branches: list[int] = field(init=False)
    """0 for the context, then one number a continuation."""
    predicts: list[int] = field(default_factory=list[int])
    """Where the logits stand that predict each of `targets`."""
    targets: list[int] = field(default_factory=list[int])
    requests: list[Encoded] = field(default_factory=list[Encoded])

    def __post_init__(self) -> None:
        self.tokens = [*self.context]
        self.positions = [*range(len(self.context))]
        self.branches = [0] * len(self.context)

    def add(self, request: Encoded) -> None:
        """Let a continuation branch off the context."""
        start, fed = len(self.tokens), request.continuation[:-1]
        if request.continuation:
            self.predicts += [len(self.context) - 1, *range(start, start + len(fed))]
        self.targets += request.continuation
        self.tokens += fed
        self.positions += range(len(self.context), len(self.context) + len(fed))
        self.branches += [len(self.requests) + 1] * len(fed)
        self.requests.append(request)


def packed_batches(requests: Sequence[Encoded], pack: bool, longest: int) -> Iterator[list[Row]]:
    """Rows in batches, longest first. With `pack`, requests of one context share a row of up to `longest` tokens."""
    rows: list[Row] = []
    shared: dict[tuple[int, ...], Row] = {}
    for request in requests:
        key = tuple(request.context)
        row = shared.get(key)
        if row is None or not pack or len(row.tokens) + len(request.continuation) > longest:
            row = shared[key] = Row(request.context)
            rows.append(row)
        row.add(request)
    rows.sort(key=lambda row: -len(row.tokens))
    yield from _filled(rows, [len(row.tokens) for row in rows])


def plain_batches(requests: Sequence[Encoded]) -> Iterator[list[Encoded]]:
    """Requests in batches by context, longest first."""
    ordered = sorted(requests, key=lambda request: -len(request.context))
    yield from _filled(ordered, [len(request.context) for request in ordered])


def _filled(ordered: Sequence[Item], lengths: Sequence[int]) -> Iterator[list[Item]]:
    """Consecutive pieces, longest first, of at most `BATCH_TOKENS` when padded to their longest."""
    start = 0
    while start < len(ordered):
        count = max(1, BATCH_TOKENS // max(1, lengths[start]))
        yield [*ordered[start : start + count]]
        start += count
