"""The gate: what only babbles fails after a few tokens, judged by what the parents say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from workspace import Workspace

from llmevo import events
from llmevo.engines.requests import RequestScorer
from llmevo.errors import CandidateError, ConfigError
from llmevo.gate import PROMPTS, Gate, fault, loops, read_prompts

LATIN = frozenset({"LATIN"})

SENSE = [
    "The sea is wide and blue, and it covers more than two thirds of the earth's surface. It holds many animals.",
    "1. Flour\n2. Water\n3. Yeast\n\nMix them well and wait for an hour before you put the dough into a hot oven.",
    "Paris",
    "42.",
    "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday: a week has seven days, and they are called so.",
]


class Said:
    """A model that gives these replies."""

    def __init__(self, *replies: str) -> None:
        self.said = replies

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        assert all(request.args[1]["max_gen_toks"] == 48 for request in requests)
        return [self.said[place % len(self.said)] for place in range(len(requests))]


def gate(*parents: Said) -> Gate:
    return Gate(PROMPTS, tokens=48, share=0.5).calibrated(parents)


@pytest.mark.parametrize(
    "reply", [*SENSE, "Το νερό είναι γαλάζιο. The sea is blue and wide, and many fish live in it."]
)
def test_ordinary_replies_have_no_fault(reply: str) -> None:
    assert fault(reply, LATIN) == ""


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "empty"),
        (" \n\n ", "empty"),
        ("!!! ... ???", "without a word"),
        ("the " * 40, "looping"),
        ("ha" * 60, "looping"),
        ("\n".join(["The answer is 12, so the answer is 12."] * 5), "looping"),
        ("Once there was a fox. " + "He saw the crow. " * 9, "looping"),
        ("海は広くて青い。" * 10, "looping"),
        ("Море широкое и синее, в нём живут рыбы.", "in another script"),
        ("海は広くて青い。魚がたくさん住んでいる。", "in another script"),
    ],
)
def test_degenerate_replies_are_told_by_their_fault(reply: str, reason: str) -> None:
    assert fault(reply, LATIN) == reason


def test_a_short_reply_does_not_loop() -> None:
    assert not loops("no no no no no no")


def test_a_candidate_fails_with_its_reason_and_a_reply() -> None:
    guard = gate(Said(*SENSE))
    guard.check(Said(*SENSE[:2], "the " * 40))
    with pytest.raises(
        CandidateError, match=r"gate: of 8 short replies 6 are degenerate \(6 looping\), such as 'the t"
    ):
        guard.check(Said(SENSE[0], "the " * 40, "the " * 40, "the " * 40))


def test_what_a_parent_does_is_no_fault() -> None:
    loop, russian = "the " * 40, "Море широкое и синее, в нём живут рыбы."
    guard = gate(Said(*SENSE), Said(loop, loop, loop, SENSE[0]), Said(russian))
    guard.check(Said(russian))
    guard.check(Said(loop, loop, loop, SENSE[0]))
    with pytest.raises(CandidateError, match="8 are degenerate"):
        guard.check(Said(loop))


class Expert:
    """A model that talks sense only at prompts with one of these words in it."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        prompts = [request.args[0] for request in requests]
        return [SENSE[0] if any(word in prompt for word in self.words) else "the " * 40 for prompt in prompts]


def test_where_a_parent_babbles_at_the_tasks_own_prompts_others_tell_what_is_broken() -> None:
    asked = [f"{n} + {n} =" for n in range(8)]
    sums, talker = Expert("+", "12", "Tell"), Expert("e")
    guard = Gate(asked, tokens=48, share=0.5).calibrated([sums, talker])
    assert len(guard.prompts) == 8
    assert any("+" in prompt for prompt in guard.prompts)  # each parent has some that it can reply to
    assert guard.share < 1
    guard.check(sums)
    guard.check(talker)
    with pytest.raises(CandidateError, match="8 are degenerate"):
        guard.check(Expert())
    assert Gate(asked, tokens=48, share=0.5).calibrated([sums, Expert("=")]).prompts == asked


def test_prompts_are_read_a_line_each_and_mistakes_are_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("One?\n\n  Two?  \n", "utf-8-sig")  # as Windows' editors write
    assert read_prompts(file) == ["One?", "Two?"]
    file.write_text("\n")
    with pytest.raises(ConfigError, match="has no prompts"):
        read_prompts(file)


# In a run


def test_a_run_goes_on_without_what_fails_at_the_gate(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = RequestScorer.generate_until

    def babbling(self: RequestScorer, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The parents, the uniform merge and a candidate talk; then one does not."""
        assert len(real(self, requests, disable_tqdm)) == len(requests)
        asked.append(len(requests))
        return [SENSE[0] if len(asked) != 7 else "the " * 40] * len(requests)

    monkeypatch.setattr(RequestScorer, "generate_until", babbling)
    (workspace.root / "prompts.txt").write_text("ab?\ncd?\n")
    search = {"optimizer": "random", "budget": 6, "population": 3, "seed": 3}
    given = workspace.config(gate={"prompts": "prompts.txt", "tokens": 16}, search=search, heldout=None)
    status, printed = workspace.llmevo("run", given, "--out", "run")
    assert status == 0, printed
    assert asked == [2 + len(PROMPTS)] * 2 + [2] * 6  # to calibrate, and for every candidate
    failed = [event for event in workspace.events("run") if isinstance(event, events.Failed)]
    assert [event.candidate for event in failed] == [4]
    assert "gate: of 2 short replies 2 are degenerate (2 looping), such as 'the the" in failed[0].reason
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"prompts": "none.txt"}, ("gate.prompts", "none.txt", "cannot be read")),
        ({"token": 48}, ("gate", "token", "tokens")),
        ({"tokens": 2}, ("gate", "tokens", "16")),
    ],
)
def test_mistakes_are_named(workspace: Workspace, value: dict[str, Any], words: tuple[str, ...]) -> None:
    status, printed = workspace.llmevo("run", workspace.config(gate=value), "--out", "run")
    assert status == 2
    assert all(word in printed for word in words), printed
    assert not (workspace.root / "run").exists()
