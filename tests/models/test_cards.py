"""Excerpts of model cards: text of others, as one line of plain text."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmevo.models.cards import excerpt, licence, plain

CARD = """---
license: mit
tags: [secret-tag]
---
<!-- a hidden comment -->
![badge](https://host/badge.svg)
# A heading

[Menu](#a) | [more](#b)

An **expert** of [sums](https://host/sums), trained by `nobody` from /srv/jane/data/x.bin at [home](file:///home/jane).

```sh
pip install everything-that-there-is-and-more-of-it
```

| | |
|---|---|
| data | 2560 sums, seed 3 |
| command | `python train.py` |
| learning rate | 0.001 |
"""


def test_an_excerpt_has_the_first_prose_and_the_rows_about_data() -> None:
    expected = "An expert of sums, trained by nobody from … at home.; data: 2560 sums, seed 3"
    assert plain(CARD) == expected


def test_a_folder_without_a_card_or_with_one_of_markup_alone_has_none(tmp_path: Path) -> None:
    assert excerpt(tmp_path) == ""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Name\n\n![x](y)\n")
    assert excerpt(tmp_path) == ""
    (tmp_path / "README.md").write_bytes(b"A card of forty letters and more \xff\xfe in bytes that are no text")
    assert excerpt(tmp_path).startswith("A card of forty letters")


@pytest.mark.parametrize("place", ["/home/jane/models/x", "C:\\Users\\jane\\x", "~/models/jane", "file:///home/jane/x"])
def test_no_place_on_a_machine_is_left(place: str) -> None:
    assert "jane" not in plain(f"This model is a merge of what lies in {place} and of its base model.")


@given(st.text() | st.lists(st.sampled_from([*CARD.split(" "), "\x1b[2J", "\u202e", "|", "---", "```"])).map("\n".join))
def test_any_card_becomes_a_bounded_printable_line(card: str) -> None:
    found = plain(card, 100)
    assert len(found) <= 100
    assert found.isprintable()


def test_a_long_card_is_cut_between_words_and_keeps_its_rows() -> None:
    found = plain("word " * 1000 + "\n\n| data | the corpus |\n", 100)
    assert found.endswith("…; data: the corpus")
    assert "word…" in found


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense:\n- apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: [apache-2.0]\n---\n", "apache-2.0"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ("---\nlicense:\ntags: [x]\n---\n", None),
        ("---\ntags: [x]\n---\n```\nlicense: mit\n```\n", None),
        ("---\n{broken\n---\n", None),
        ("No front matter.", None),
    ],
)
def test_the_licence_is_that_of_the_front_matter(card: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licence(tmp_path) == expected
