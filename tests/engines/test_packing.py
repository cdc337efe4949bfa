"""The layout of requests in trees, rows and batches."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmevo.engines.scoring import packing
from llmevo.engines.scoring.backbone import BatchTensors, tree_mask
from llmevo.engines.scoring.packing import Batch, Encoded, Row, packed_batches, stem_groups

texts = st.lists(st.integers(0, 2), min_size=1, max_size=12)
asked = st.lists(st.tuples(texts, st.lists(st.integers(0, 2), max_size=5)), max_size=12)


def encoded(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Encoded]:
    return [Encoded(i, [*context], [*rest]) for i, (context, rest) in enumerate(pairs)]


def read(batch: Batch, row: Row, node: int) -> list[int]:
    """The text that a token of a row sees, by the row's mask."""
    ends = torch.tensor([row.ends])
    each = len(batch.stems) > 1
    stem = batch.stems[batch.rows.index(row) if each else 0] if batch.stems else []
    longest = max([len(one) for one in batch.stems], default=0)
    lengths = torch.tensor([len(stem), longest])
    mask = tree_mask(ends.expand(2, -1), lengths, torch.float32)[0, 0, node] == 0
    padded = [*stem, *[-1] * (longest - len(stem)), *row.tokens]
    return [token for token, seen in zip(padded, mask.tolist(), strict=True) if seen]


@settings(max_examples=150, deadline=None)
@given(pairs=asked, packs=st.booleans(), stems=st.booleans(), reach=st.integers(6, 40), row=st.integers(4, 40))
def test_every_token_asked_about_sees_its_own_text_and_no_other(
    pairs: list[tuple[list[int], list[int]]], packs: bool, stems: bool, reach: int, row: int
) -> None:
    requests = encoded(pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "ROW_TOKENS", row)
        patch.setattr(packing, "LEAST_SAVED", 3)
        patch.setattr(packing, "LONG", 5)
        batches = packed_batches(requests, packs, stems, reach, 60)
    found: dict[int, list[tuple[list[int], int]]] = {request.place: [] for request in requests}
    for batch in batches:
        for each in batch.rows:
            assert batch.masked or not each.branches
            assert each.positions == [len(read(batch, each, i)) - 1 for i in range(len(each.tokens))]
            for node, target, place in each.asked:
                found[place].append((read(batch, each, node), target))
    for request in requests:
        whole = [*request.context, *request.continuation]
        start = len(request.context)
        assert found[request.place] == [(whole[:i], whole[i]) for i in range(start, len(whole))]


def test_choices_and_contexts_that_begin_alike_are_computed_once() -> None:
    batches = packed_batches(
        encoded([([1, 2, 3], [4, 5, 6]), ([1, 2, 3], [4, 7]), ([1, 2, 8], [4])]), True, True, 99, 99
    )
    ((row,),) = [batch.rows for batch in batches]
    assert row.tokens == [1, 2, 3, 4, 5, 8]
    assert row.positions == [0, 1, 2, 3, 4, 2]
    assert row.ends == [6, 6, 5, 5, 5, 6]


def test_logits_are_asked_for_once_a_token() -> None:
    (batch,) = packed_batches(encoded([([1, 2], [3, 4]), ([1, 2], [5, 4]), ([1, 2], [6])]), True, True, 99, 99)
    inputs = BatchTensors.of(batch, 0)
    assert inputs.heads.tolist() == [[0, 1], [0, 2], [0, 3]]
    assert inputs.bounds == [0, 3, 4, 5]
    assert inputs.targets.tolist() == [6, 3, 5, 4, 4]
    assert inputs.places == [2, 0, 1, 0, 1]


def test_solved_examples_that_many_questions_share_become_their_stem() -> None:
    shots, others = [*range(100, 400)], [*range(500, 900)]
    requests = encoded(
        [([*shots, *range(i, i + 60)], [choice, 1]) for i in range(20) for choice in (2, 3)]
        + [([*others, *range(i, i + 60)], [choice, 1]) for i in range(20) for choice in (2, 3)]
        + [([i, *range(1000, 1200)], [1]) for i in range(5)]
    )
    groups = stem_groups(sorted(requests, key=lambda request: request.text), 5000)
    assert [(stem, len(members)) for stem, members in groups] == [(shots, 40), (others, 40), ([], 5)]
    batches = packed_batches(requests, True, True, 5000, 2048)
    tokens = sum(len(row.tokens) for batch in batches for row in batch.rows)
    assert tokens < 40 * 62 + 5 * 201 + 1
    assert [*dict.fromkeys(tuple(map(len, batch.stems)) for batch in batches)] == [(300,), (400,), ()]


def test_a_stem_leaves_every_context_a_token() -> None:
    requests = encoded([([1] * 300, [2, *range(i, i + 250)]) for i in range(3, 9)] + [([1] * 300 + [2], [3] * 300)])
    for stem, members in stem_groups(requests, 5000):
        assert all(len(stem) < len(member.context) for member in members)


def test_texts_that_begin_alike_by_chance_get_no_stem() -> None:
    requests = encoded([([1] * 40 + [*range(i, i + 100)], [1]) for i in range(2, 5)])
    assert [len(stem) for stem, _ in stem_groups(requests, 5000)] == [0]


def test_a_batch_holds_no_more_than_its_tokens_and_little_padding() -> None:
    requests = encoded([([i, *range(100, 130 + i)], [1, 2]) for i in range(90)])
    batches = packed_batches(requests, True, True, 5000, 1024)
    for batch in batches:
        longest = max(len(row.tokens) for row in batch.rows)
        assert longest * len(batch.rows) <= 1024
    padded = sum(max(len(row.tokens) for row in batch.rows) * len(batch.rows) for batch in batches)
    assert padded < 1.1 * sum(len(request.text) for request in requests)
