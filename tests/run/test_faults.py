"""Whatever an LLM answers is counted, costs a bounded number of calls, and never stops the search."""

import json
import math
from typing import Any

import pytest

from llmevo.run.log import events
from support.fake_server import Answer, FakeServer, chat, refusal, serving
from support.workspace import Workspace

pytestmark = pytest.mark.usefixtures("slept")

KEY = "sk-secret-0123456789"


def proposals(*tables: Any, **more: Any) -> str:
    """An answer of the workspace's genome: two slices of two weights each."""
    rows = [{"kind": "explore", "reason": "so", "genome": table, "predicted_score": 50, **more} for table in tables]
    return json.dumps({"analysis": "so", "proposals": rows})


GOOD = proposals([[40, 47], [33, 61]], [[81, 22], [56, 14]])


def different() -> list[Answer]:
    """Answers that differ, of a thousand tokens read and as many written."""
    return [chat(proposals([[10 * i, 20], [30, 40]]), prompt=1000, completion=1000) for i in range(1, 9)]


def searched(
    workspace: Workspace, server: FakeServer, *options: object, budget: int = 10, **llm: Any
) -> tuple[int, str]:
    """A run with this server for its LLM, which is asked every second generation or so."""
    search = {"optimizer": "llm", "budget": budget, "population": 3, "seed": 3}
    given = {"proposer": "openai", "base_url": server.url, "retries": 1, "timeout": 20.0, **llm}
    config = workspace.config(search=search, llm=given, heldout=None, engine={"self_check": False})
    return workspace.llmevo("run", config, "--out", "run", *options)


FAULTS: dict[str, tuple[Answer, str]] = {
    "prose": (chat("I would rather talk about the weather."), "unreadable"),
    "half a JSON": (chat('{"analysis": "yes", "proposals": [{"genome": [[1,'), "unreadable"),
    "nothing": (chat(""), "unreadable"),
    "wrong shapes": (chat(proposals([[1, 2, 3]], [[[[5]]]], 7, {})), "unreadable"),
    "NaN": (chat(proposals([[math.nan, 1], [math.inf, 2]])), "unreadable"),
    "words for numbers": (chat(proposals([["many", "few"], ["some", "none"]])), "unreadable"),
    "ten megabytes": (chat("x" * 10_000_000), "lost"),
    "silence": (Answer(silent=True), "lost"),
    "busy for ever": (refusal(429, "slow down", retry_after="3600"), "lost"),
    "a web page": (Answer("<html>busy</html>"), "lost"),
}
"""What comes, and what it counts as."""


@pytest.mark.parametrize(("answer", "counts_as"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_counted_costs_few_calls_and_the_search_goes_on(
    workspace: Workspace, answer: Answer, counts_as: str, slept: list[float]
) -> None:
    with serving(Answer({"data": []}), answer) as server:
        status, printed = searched(workspace, server, timeout=0.3 if answer.silent else 20.0)
    assert status == 0, printed
    state = workspace.state("run")
    assert len(state.trials) == 10
    assert state.finished is not None
    counts = state.finished.proposals
    assert counts["prompts"] > 0
    assert counts[counts_as] == counts["prompts"]
    assert counts["used"] == 0
    assert all(event.problems for event in state.prompted)
    # One repair in all, for it failed; retries only until the server was given up.
    assert counts["repairs"] == (counts_as == "unreadable")
    assert len(server.questions) <= counts["prompts"] + 1
    assert all(wait <= 60 for wait in slept)


@pytest.mark.parametrize(
    "table",
    [
        [["40", "47"], ["33", " 61 "]],
        [[0.4, 0.47], [0.33, 0.61]],
        [40, 47, 33, 61],
        [[4000, 4700], [3300, 6100]],
        [[-40, 47], [33, 61]],
    ],
    ids=["strings", "fractions", "flat", "another scale", "below the bounds"],
)
def test_numbers_of_another_kind_are_read_or_left_and_never_leave_the_bounds(workspace: Workspace, table: Any) -> None:
    with serving(Answer({"data": []}), chat(proposals(table))) as server:
        status, printed = searched(workspace, server)
    assert status == 0, printed
    state = workspace.state("run")
    assert len(state.trials) == 10
    assert state.started is not None
    bounds = {gene["name"]: (gene["low"], gene["high"]) for gene in state.started.genes}
    for candidate in state.candidates.values():
        assert all(bounds[name][0] <= value <= bounds[name][1] for name, value in candidate.genes.items())


def test_the_same_answer_for_ever_is_scored_once(workspace: Workspace) -> None:
    with serving(Answer({"data": []}), chat(GOOD)) as server:
        status, printed = searched(workspace, server)
    assert status == 0, printed
    state = workspace.state("run")
    points = [tuple(c.genes.values()) for c in state.candidates.values() if c.origin == "llm"]
    assert len(points) == len({*points}) <= 2
    assert len(server.questions) <= len(state.prompted)


def test_a_busy_server_is_waited_for_as_it_asks(workspace: Workspace, slept: list[float]) -> None:
    with serving(Answer({"data": []}), refusal(429, "slow", retry_after="7"), chat(GOOD)) as server:
        assert searched(workspace, server)[0] == 0
    assert slept == [7.0]
    assert workspace.state("run").prompted[0].reply == GOOD


def test_an_unreadable_answer_is_asked_for_once_more_with_its_problems_named(workspace: Workspace) -> None:
    with serving(Answer({"data": []}), chat("Sorry, what?"), chat(GOOD)) as server:
        assert searched(workspace, server)[0] == 0
    state = workspace.state("run")
    first, second = state.prompted[:2]
    assert (first.reply, first.used, first.repair) == ("Sorry, what?", 0, False)
    assert (second.reply, second.repair, second.generation) == (GOOD, True, first.generation)
    said, asked = server.questions[1]["messages"][-2:]
    assert said == {"role": "assistant", "content": "Sorry, what?"}
    assert first.problems[0] in asked["content"]
    assert state.finished is not None
    assert state.finished.proposals["repairs"] >= 1
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


def test_a_cap_on_calls_holds_and_the_search_goes_on_without_the_llm(workspace: Workspace) -> None:
    with serving(Answer({"data": []}), *different()) as server:
        status, printed = searched(workspace, server, "--max-llm-calls", 1, budget=24)
    assert status == 0, printed
    state = workspace.state("run")
    assert len(server.questions) == 1
    assert len(state.trials) == 24
    capped = [event for event in state.prompted if not event.calls]
    assert len(capped) == len(state.prompted) - 1 > 0
    assert all(event.reply is None and "llm.max_calls" in event.problems[0] for event in capped)
    assert state.finished is not None
    assert state.finished.proposals["capped"] == len(capped)
    assert "not asked for" in printed
    assert workspace.llmevo("replay", "run", "--verify")[0] == 0


def test_a_cap_on_the_cost_holds_also_for_the_next_call(workspace: Workspace) -> None:
    price = {"prompt": 1000.0, "completion": 1000.0}  # two a call
    with serving(Answer({"data": []}), *different()) as server:
        status, printed = searched(workspace, server, "--max-cost", "3", budget=24, price=price)
    assert status == 0, printed
    state = workspace.state("run")
    assert sum(event.cost for event in state.prompted) == pytest.approx(2.0)
    assert len(server.questions) == 1 < len(state.prompted)


def test_a_cap_on_the_cost_without_prices_says_what_is_missing(workspace: Workspace) -> None:
    with serving(Answer({"data": []})) as server:
        status, printed = searched(workspace, server, "--max-cost", "3")
    assert status == 2
    assert "price" in printed


def named(model: str) -> Answer:
    answer = chat(GOOD)
    answer.body["model"] = model
    return answer


@pytest.mark.parametrize(
    "answer",
    [
        named("half an emoji \ud83d"),
        Answer({"error": {"message": "half an emoji \ud83d"}}, 400),
        Answer('{"choices":' + "[" * 5000 + "]" * 5000 + "}", headers={"content-type": "application/json"}),
        refusal(403, "flagged by moderation"),
        refusal(404, "the tunnel is offline"),
    ],
    ids=["a model's name", "an error", "a deep body", "moderation", "a tunnel"],
)
def test_no_answer_after_a_good_one_ends_a_run(workspace: Workspace, answer: Answer) -> None:
    with serving(Answer({"data": []}), chat(GOOD), answer) as server:
        status, printed = searched(workspace, server, budget=16)
    assert status == 0, printed
    assert len(workspace.state("run").trials) == 16
    assert workspace.state("run").prompted[0].used


def test_letters_that_only_look_like_a_hidden_name_are_hidden_too(workspace: Workspace) -> None:
    said = chat(json.dumps({"analysis": "letter\u017f decide", "proposals": [{"genome": [[40, 47], [33, 61]]}]}))
    with serving(Answer({"data": []}), said, *different()) as server:
        status, printed = searched(workspace, server, "--mask-names", budget=16)
    assert status == 0, printed
    later = [message["content"] for event in workspace.state("run").prompted[1:] for message in event.messages]
    assert any("Analysis: task 1 decide" in text for text in later)
    assert not any("letter" in text.lower() for text in later)


def test_a_strict_run_stops_when_the_llm_is_lost_and_goes_on_when_it_is_back(workspace: Workspace) -> None:
    with serving(Answer({"data": []}), chat(GOOD), refusal(500, "broken"), refusal(500, "broken")) as server:
        status, printed = searched(workspace, server, "--strict-llm", "--api-key", KEY, budget=44)
        assert status == 1, printed
        assert "broken" in printed
        assert "llmevo resume run" in printed
        assert "Traceback" not in printed
        before = workspace.events("run")
        assert not isinstance(before[-1], events.RunFinished)
        server.script[:] = [chat(GOOD)]
        status, printed = workspace.llmevo("resume", "run", "--api-key", KEY)
    assert status == 0, printed
    assert workspace.events("run")[: len(before)] == before
    assert len(workspace.state("run").trials) == 44


def test_a_run_stopped_between_an_answer_and_its_repair_resumes_with_the_repair(workspace: Workspace) -> None:
    with serving(Answer({"data": []}), chat("Sorry, what?"), chat(GOOD)) as server:
        assert searched(workspace, server)[0] == 0
        whole = workspace.state("run")
        file = workspace.root / "run" / "events.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        place = next(i for i, line in enumerate(lines) if '"prompted"' in line)
        file.write_text("".join(lines[: place + 1]))
        status, printed = workspace.llmevo("resume", "run")
    assert status == 0, printed
    again = workspace.state("run")
    assert [event.repair for event in again.prompted[:2]] == [False, True]
    assert again.candidates == whole.candidates
