"""JSON in the text of an answer."""

from typing import Any

from llmevo.llm.json import DEEPEST, objects, scalars, without_thoughts


def test_scalars_come_in_their_order_from_any_depth() -> None:
    nested: Any = [1, {"a": [2, 3], "b": "four"}, [], None]
    for _ in range(5000):
        nested = [nested, {}]
    assert [*scalars(nested)] == [1, 2, 3, "four", None]


def test_objects_are_read_up_to_a_depth_that_no_answer_needs() -> None:
    def text(levels: int) -> str:
        return '{"a":' * levels + "1" + "}" * levels

    assert objects(text(DEEPEST - 1))
    assert not objects(text(DEEPEST))


def test_thoughts_are_told_from_what_follows_them() -> None:
    assert without_thoughts("<think>so</think> and </think>it is") == "it is"
    assert without_thoughts("its server left out the beginning</think>it is") == "it is"
    assert without_thoughts(" <think>cut off") == ""
    assert without_thoughts("it is") == "it is"
