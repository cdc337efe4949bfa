"""The layout of requests in rows and batches, before any tensor is made.

A row is a tree of tokens: texts with a common prefix share its tokens, and a token attends to its ancestors only. Texts
enter rows in alphabetical order, so texts with a common prefix are neighbours. A prefix that several rows share is
their stem: it is computed once, and the rows attend to its keys and values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Self, TypeVar

ROW_TOKENS = 192
"""Tokens up to which a row takes in texts that share little: each token costs attention to the whole row."""

SHARE = 4
"""A text joins a full row only if the part that it shares is this many times larger than the rest of it."""

LONG = 192
"""Tokens from which on a context is computed before its continuations rather than in one row with them."""

LEAST_SAVED = 256
"""Tokens a stem must save: it costs a pass through the model with one row."""

LEVELS = 8
"""The depth of the recursion that divides a group of texts in search of longer stems."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Encoded:
    """A request in tokens."""

    place: int
    """Its index among the requests."""
    context: list[int]
    continuation: list[int]

    @cached_property
    def text(self) -> list[int]:
        """The tokens that the model reads: the last token of a continuation predicts nothing."""
        return self.context + self.continuation[:-1]


@dataclass
class Row:
    """A tree of tokens in depth-first order, without the stem that precedes it."""

    stem: int
    """The number of tokens of each text that are in the stem."""
    tokens: list[int] = field(default_factory=list[int])
    positions: list[int] = field(default_factory=list[int])
    """The place of each token in its own text."""
    ends: list[int] = field(default_factory=list[int])
    """One past each token's last descendant: a token sees those at or before it whose end lies behind it."""
    asked: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    """(token of the row, target that it predicts, the request's place)."""
    branches: bool = False
    _text: list[int] = field(default_factory=list[int])
    _path: list[int] = field(default_factory=list[int])

    @classmethod
    def of(cls, requests: Sequence[Encoded], stem: int = 0) -> Self:
        """A row with the texts of these requests."""
        row = cls(stem)
        for request in sorted(requests, key=lambda request: request.text):
            row.add(request)
        return row

    def shared(self, text: Sequence[int]) -> int:
        """The number of tokens of a text that are in the row already, the stem included."""
        return _common_prefix(self._text, text) if self.tokens else self.stem

    def add(self, request: Encoded) -> None:
        """Add a text, which must not precede the last one in alphabetical order."""
        text = request.text
        shared = self.shared(text)
        self.branches = self.branches or shared < len(self._text)
        del self._path[shared - self.stem :]
        for depth in range(shared, len(text)):
            self._path.append(len(self.tokens))
            self.tokens.append(text[depth])
            self.positions.append(depth)
            self.ends.append(0)
        for node in self._path:
            self.ends[node] = len(self.tokens)
        self._text = text
        first = len(request.context) - 1 - self.stem
        for node, target in zip(self._path[first:], request.continuation, strict=True):
            self.asked.append((node, target, request.place))


@dataclass
class Batch:
    """Rows for one pass through the model."""

    stems: list[list[int]]
    """The stems of the rows: none, one for all, or one each. Batches of one stem follow each other and hold the same
    list."""
    rows: list[Row]
    masked: bool
    """True if the rows are trees and need a mask of their own."""


def packed_batches(requests: Sequence[Encoded], packs: bool, stems: bool, reach: int, tokens: int) -> list[Batch]:
    """Rows in batches of at most `tokens` tokens, longest first.

    `packs` allows rows that are trees, `stems` rows with a stem; neither is made longer than `reach`. Without trees,
    requests of the same text still share a row.
    """
    ordered = sorted((request for request in requests if request.continuation), key=lambda request: request.text)
    short = [request for request in ordered if packs and len(request.text) <= reach]
    long = [request for request in ordered if not packs or len(request.text) > reach]
    batches: list[Batch] = []
    for stem, members in stem_groups(short, reach if stems else 0):
        apart, together = _by_context(members) if stems and not stem else ([], members)
        for some in _by_length(_trees(together, len(stem), reach), tokens):
            batches.append(Batch([stem] if stem else [], some, bool(stem) or any(row.branches for row in some)))
        for some in filled(apart, [len(contexts[0].context) for contexts in apart], tokens):
            before = [requests[0].context[:-1] for requests in some]
            batches.append(Batch(before, [Row.of(requests, len(requests[0].context) - 1) for requests in some], True))
    batches += [Batch([], some, False) for some in _by_length(_plain_rows(long), tokens)]
    return batches


def _by_context(members: Sequence[Encoded]) -> tuple[list[list[Encoded]], list[Encoded]]:
    """Requests grouped by long context, longest context first, and the rest.

    A long context without branches behind it needs no mask, which halves the cost of its attention.
    """
    contexts: dict[tuple[int, ...], list[Encoded]] = {}
    for request in members:
        contexts.setdefault(tuple(request.context) if len(request.context) >= LONG else (), []).append(request)
    rest = contexts.pop((), [])
    apart: list[list[Encoded]] = []
    for requests in contexts.values():
        if requests[0].text == requests[-1].text:
            rest += requests
        else:
            apart.append(requests)
    return sorted(apart, key=lambda one: -len(one[0].context)), sorted(rest, key=lambda request: request.text)


def _trees(members: Sequence[Encoded], stem: int, reach: int) -> list[Row]:
    """Rows of texts: a text joins the last row if that has room, or if most of the text is in it already."""
    rows: list[Row] = []
    for request in members:
        text = request.text
        if rows:
            row, shared = rows[-1], rows[-1].shared(text)
            length = len(row.tokens) + len(text) - shared
            joins = length <= ROW_TOKENS or shared - stem >= SHARE * (len(text) - shared)
            if joins and stem + length <= reach:
                row.add(request)
                continue
        rows.append(Row.of([request], stem))
    return rows


def _plain_rows(members: Sequence[Encoded]) -> list[Row]:
    rows: list[Row] = []
    last: list[int] | None = None
    for request in members:
        if request.text != last:
            rows.append(Row(0))
            last = request.text
        rows[-1].add(request)
    return rows


def _by_length(rows: list[Row], tokens: int) -> Iterator[list[Row]]:
    rows = sorted(rows, key=lambda row: -len(row.tokens))
    return filled(rows, [len(row.tokens) for row in rows], tokens)


def filled(ordered: Sequence[Item], lengths: Sequence[int], tokens: int) -> Iterator[list[Item]]:
    """Consecutive pieces of items, longest first, each of at most `tokens` tokens when padded to its longest item."""
    start = 0
    while start < len(ordered):
        count = max(1, tokens // max(1, lengths[start]))
        yield [*ordered[start : start + count]]
        start += count


def stem_groups(ordered: Sequence[Encoded], reach: int) -> list[tuple[list[int], list[Encoded]]]:
    """(stem, its requests) in order; requests without a stem come last. Stem and text fit into `reach` tokens."""
    texts = [request.text for request in ordered]
    alike = [0, *(_common_prefix(one, other) for one, other in pairwise(texts))]
    groups: list[tuple[list[int], list[Encoded]]] = []
    rest: list[Encoded] = []
    start = 0
    for stop, stem in _stems(ordered, alike, 0, len(texts), 0) if reach and texts else [(len(texts), 0)]:
        if stem and max(map(len, texts[start:stop])) <= reach:
            groups.append((texts[start][:stem], [*ordered[start:stop]]))
        else:
            rest += ordered[start:stop]
        start = stop
    return [*groups, *([([], rest)] if rest else [])]


def _stems(ordered: Sequence[Encoded], alike: list[int], start: int, stop: int, level: int) -> list[tuple[int, int]]:
    """(end of a group, length of its stem) for the texts from `start` to `stop`: the stems that save most tokens.

    `alike` has the length of each text's common prefix with the one before.
    """
    inside = range(start + 1, stop)
    stem = min([alike[i] for i in inside] + [len(ordered[i].context) - 1 for i in range(start, stop)])
    saved = stem * (_row_count(ordered, alike, range(start, stop), stem) - 1)
    divided: list[tuple[int, int]] = []
    if level < LEVELS and stop - start > 2:
        bounds = [start, *(i for i in inside if alike[i] <= stem), stop]
        if len(bounds) > 2:
            for one, other in pairwise(bounds):
                divided += _stems(ordered, alike, one, other, level + 1)
    gained, first = 0, start
    for end, length in divided:
        gained += length * (_row_count(ordered, alike, range(first, end), length) - 1) if length else 0
        first = end
    if saved >= LEAST_SAVED and saved >= gained:
        return [(stop, stem)]
    return divided if gained else [(stop, 0)]


def _row_count(ordered: Sequence[Encoded], alike: list[int], places: range, stem: int) -> int:
    """An estimate of the rows that the texts fill after a stem. Continuations of one context share a row."""
    tokens = sum(len(ordered[i].text) - max(stem, alike[i] if i > places[0] else 0) for i in places)
    contexts = sum(i == places[0] or alike[i] < len(ordered[i].context) for i in places)
    return max(1, min(contexts, -(-tokens // ROW_TOKENS)))


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(i for i in range(length) if one[i] != other[i])
