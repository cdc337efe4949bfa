"""Which questions belong to which set."""

from contextlib import nullcontext
from typing import Any

import pytest

from llmevo.errors import TaskError
from llmevo.evaluation.questions import blocks, check_disjoint, hash_text, near_duplicates, select_questions
from llmevo.evaluation.tasks.task import AskingOptions

TEXTS = [f"What is {a} + {b}?" for a in range(20) for b in range(10)]


def taken(texts: list[str], **protocol: Any) -> list[str]:
    places = select_questions("sums", len(texts), texts.__getitem__, AskingOptions(**protocol))
    return [texts[place] for place in places]


@pytest.mark.parametrize("seed", [0, 1])
def test_shares_are_disjoint_and_together_everything(seed: int) -> None:
    parts = [taken(TEXTS, share=share, seed=seed) for share in ((0.0, 0.5), (0.5, 0.7), (0.7, 1.0))]
    assert sorted(text for part in parts for text in part) == sorted(TEXTS)
    assert [len(part) / len(TEXTS) for part in parts] == pytest.approx([0.5, 0.2, 0.3], abs=0.1)
    assert parts[0] != taken(TEXTS, share=(0.0, 0.5), seed=seed + 2)


def test_equal_questions_stay_together_whatever_their_case_and_spacing() -> None:
    assert hash_text("What is  1+2 ?", 3) == hash_text("what is 1 + 2?", 3)
    assert hash_text("What is 1+2?", 3) != hash_text("What is 1-2?", 3)


def test_what_a_limit_leaves_can_be_asked_by_another() -> None:
    for shuffle in (False, True):
        first = taken(TEXTS, limit=50, shuffle=shuffle)
        rest = taken(TEXTS, after=50, shuffle=shuffle)
        assert len(first) == 50
        assert sorted(first + rest) == sorted(TEXTS)
    with pytest.raises(TaskError, match="sums has no questions after the first 200"):
        taken(TEXTS, after=200)
    with pytest.raises(TaskError, match="no questions in the 1% of its 2 that `split` gives"):
        taken(TEXTS[:2], share=(0.0, 0.01))


def test_a_set_that_repetitions_leave_without_questions_says_so() -> None:
    text = "What is 1 + 2?"
    with pytest.raises(TaskError, match=r"no questions in the .*, and 99 of the 100 are repeated, which all go into"):
        taken([text] * 100, share=(0.0, hash_text(text, 0)))


def test_every_block_has_its_share_of_every_task() -> None:
    parts = blocks({"a": range(10), "b": range(100, 107)}, 3)
    assert [part["a"] for part in parts] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert [len(part["b"]) for part in parts] == [3, 2, 2]
    assert sorted(place for part in parts for place in part["b"]) == [*range(100, 107)]


def test_a_task_with_fewer_questions_than_parts_is_asked_in_the_first_part() -> None:
    parts = blocks({"a": range(10), "b": range(2), "c": range(1)}, 3)
    assert [{*part} for part in parts] == [{"a", "b", "c"}, {"a"}, {"a"}]
    assert parts[0] == {"a": [0, 3, 6, 9], "b": [0, 1], "c": [0]}


def test_a_question_both_searched_on_and_held_out_is_refused() -> None:
    search = [("sums", text, ()) for text in TEXTS[:8]]
    with pytest.raises(TaskError, match=r"heldout: 2 questions of other .*task sums"):
        check_disjoint("heldout", [("other", text.upper(), ()) for text in TEXTS[6:]], search)
    check_disjoint("heldout", [("other", text, ()) for text in TEXTS[8:]], search)
    check_disjoint("heldout", [("other", text.replace("+", "-"), ()) for text in TEXTS], search)


@pytest.mark.parametrize(
    ("held", "is_shared"),
    [(("apple", "stone"), True), (("Stone ", "apple"), True), ((), True), (("dog", "pear"), False)],
)
def test_equal_texts_with_other_choices_are_other_questions(held: tuple[str, ...], is_shared: bool) -> None:
    text = "Which is a fruit?"
    for one, other in ((held, ("apple", "stone")), (("apple", "stone"), held)):
        with pytest.raises(TaskError, match="also searched") if is_shared else nullcontext():
            check_disjoint("heldout", [("b", text, one)], [("a", text, other)])


def test_near_duplicates_are_found_and_short_questions_are_not_judged() -> None:
    story = "Ann has three red apples and gives one of them to Bob who then eats it while Carl is watching them both"
    search = [("stories", story), ("sums", "What is 1 + 2?")]
    changed = ("heldout", f"{story} today")
    other = ("heldout", "Carl watches while Bob eats one of the three apples that Ann had and gave away to him today")
    assert near_duplicates([changed, other, ("heldout", "What is 1 + 3?")], search) == [(changed, search[0])]
    years = [("years", f"{story} in the year {year} of our count, as everybody knows who was there") for year in (1, 2)]
    assert not near_duplicates(years[:1], years[1:])


def test_an_instruction_before_every_question_makes_none_of_them_alike() -> None:
    instruction = (
        "Read the following question carefully and answer it in one word without any further explanation. " * 3
    )
    colours = [f"{a}{b}" for a in "bcdfghjklm" for b in ("red", "blue", "green", "grey", "pink")]
    asked = [
        ("q", f"{instruction}Which fruit with {one} skin does a {one} bird of the {one} hills eat?") for one in colours
    ]
    assert not near_duplicates(asked[:25], asked[25:])
    assert near_duplicates([("q", asked[7][1])], asked) == [(asked[7], asked[7])]
