"""The lines of `events.jsonl`: what outside tools read."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import ValidationError

from llmevo.evaluation.judges.verdicts import Verdict
from llmevo.evaluation.score import Score
from llmevo.run.log import events
from llmevo.search.trial import Candidate
from llmevo.workers.protocol import Result

TASKS = {"sums": {"acc,none": 0.5, "acc_stderr,none": 0.1}}
CANDIDATE = {"id": 4, "origin": "llm", "genes": {"a/all/weight": 0.3}, "recipe": {"merge_method": "ties"}, "note": "ü"}

EXAMPLES: tuple[events.Event, ...] = (
    events.RunStarted(
        config={"limit": None, "tasks": ["sums"]},
        root=".",
        prompts={"chat_user.j2": "{{ q }}"},
        versions={"llmevo": "0"},
        sources=[{"reference": "a", "revision": None, "checksum": "00"}],
        seed=1,
        genes=[{"name": "a/all/weight", "low": 0.0, "high": 1.0}],
        layers=2,
        items=20,
        heldout_items=9,
        proposer="local",
        style="completion",
    ),
    events.Resumed(
        reason="budget 60",
        budget={"evaluations": 60, "minutes": 5.0},
        forced=[events.Change(key="config.limit", before=None, now=3)],
        versions={"numpy": "2"},
    ),
    events.Prompted(
        generation=1,
        model="m",
        style="chat",
        messages=[{"role": "user", "content": "line\u2028line\nline"}],
        reply=None,
        tokens={"prompt": 3, "completion": 4},
        cost=0.1,
        seconds=1.5,
        problems=["late"],
        analysis="",
        used=0,
    ),
    events.Asked(generation=1, candidates=[CANDIDATE]),
    events.Evaluated(candidate=4, score=0.1 + 0.2, stderr=0.1, tasks=TASKS, items=20, seconds={"merge": 0.1}),
    events.Failed(candidate=4, reason="NaN", seconds={}),
    events.Selected(candidate=4, generation=1, finalists=5, score=0.3, stderr=0.1, tasks=TASKS, items=20, seconds={}),
    events.Served(
        candidate=4,
        questions="search",
        generation=1,
        finalists=5,
        score=0.3,
        stderr=0.1,
        tasks=TASKS,
        items=20,
        seconds={},
        quantized="q4_0",
    ),
    events.Told(generation=1, state="ab12", sigma=None, best=4),
    events.HeldOut(
        row="base", kind="base", candidate=None, score=0.5, stderr=0.1, tasks=TASKS, items=9, seconds={"evaluate": 2.0}
    ),
    events.Unscored(step="heldout", candidate=None, reason="NaN", row="base", kind="base"),
    events.RunFinished(best=4, search_score=0.5, heldout={"score": 0.4, "rows": {}}, proposals={"asked": 1}),
    events.Judged(
        generation=1,
        task="chat",
        model="m",
        verdicts=[Verdict(key="ab12", value=0.5, reason="ü")],
        calls=2,
        tokens={"prompt": 3, "completion": 4},
        cost=0.1,
    ),
    events.Presented(task="taste", poll="cd34", player="ef56", replies=["line\u2028line"]),
    events.Worker(worker="2", change="lost", place="host, process 7", reason="its process died", request=3),
    events.Voted(task="taste", poll="cd34", player="ef56", other="ab78", prompt=2, choice="tie"),
)


def line_of(event: events.Event) -> str:
    return event.model_dump_json(by_alias=True)


def tag(event: events.Event) -> str:
    return event.event


each = pytest.mark.parametrize("event", EXAMPLES, ids=tag)


@each
def test_an_event_comes_back_from_its_line_as_it_was(event: events.Event) -> None:
    assert events.EVENTS.validate_json(line_of(event)) == event


@each
def test_an_event_is_one_line_with_its_tag_time_and_schema(event: events.Event) -> None:
    line = line_of(event)
    assert "\n" not in line
    raw = json.loads(line)
    assert raw["event"] == event.event
    assert raw["schema"] == events.SCHEMA
    assert raw["time"].startswith("20")
    assert raw["time"].endswith("+00:00")


@each
def test_a_field_of_a_later_version_does_not_stop_a_reader(event: events.Event) -> None:
    raw = {**json.loads(line_of(event)), "mood": "good"}
    assert events.EVENTS.validate_python(raw) == event


PROMISED = {
    "run_started": "config prompts versions sources seed genes",
    "resumed": "reason",
    "prompted": "model messages reply tokens cost seconds problems",
    "asked": "generation candidates",
    "evaluated": "candidate score tasks items seconds",
    "failed": "candidate reason",
    "selected": "candidate generation finalists score tasks items",
    "served": "candidate questions generation finalists score tasks items",
    "told": "generation state sigma",
    "heldout": "row score stderr tasks",
    "unscored": "step candidate reason",
    "run_finished": "best search_score heldout",
    "judged": "generation task model verdicts calls tokens cost",
    "presented": "task poll player replies",
    "worker": "worker change",
    "voted": "task poll player other prompt choice",
}
"""What other tools may count on in every log; later fields have defaults, so that older logs still read."""


@each
def test_an_event_without_one_of_the_fields_promised_is_refused(event: events.Event) -> None:
    for field in PROMISED[event.event].split():
        raw = json.loads(line_of(event))
        del raw[field]
        with pytest.raises(ValidationError, match=field):
            events.EVENTS.validate_python(raw)


@each
def test_a_log_from_before_a_field_was_added_still_reads(event: events.Event) -> None:
    added = {name for name, field in type(event).model_fields.items() if not field.is_required()}
    raw = json.loads(line_of(event))
    older = {name: value for name, value in raw.items() if name not in added - {"event", "time"}}
    assert events.EVENTS.validate_python(older).event == event.event


def test_every_event_has_an_example_here() -> None:
    known: Any = events.EVENTS.core_schema
    assert {event.event for event in EXAMPLES} == {*known["choices"]}


@pytest.mark.parametrize("raw", [{"event": "celebrated", "time": "", "schema": 1}, {"time": "", "schema": 1}])
def test_an_unknown_or_missing_tag_is_refused(raw: Mapping[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"tag|discriminator"):
        events.EVENTS.validate_python(raw)


CONTRACT = {
    "run_started": {"config", "prompts", "versions", "sources", "seed", "genes"},
    "prompted": {"model", "messages", "reply", "tokens", "cost", "seconds", "problems"},
    "asked": {"generation", "candidates"},
    "evaluated": {"candidate", "score", "tasks", "items", "seconds"},
    "failed": {"candidate", "reason"},
    "told": {"generation", "state", "sigma"},
    "run_finished": {"best", "search_score", "heldout"},
}
"""The table of the design that outside tools rely on; fields are only ever added."""


@pytest.mark.parametrize("name", CONTRACT)
def test_the_fields_that_outside_tools_rely_on_are_in_the_line(name: str) -> None:
    (event,) = [event for event in EXAMPLES if event.event == name]
    assert CONTRACT[name] | {"event", "time", "schema"} <= json.loads(line_of(event)).keys()


def test_asked_candidates_are_read_with_their_generation() -> None:
    asked = events.Asked(generation=3, candidates=[CANDIDATE])
    assert asked.read() == [Candidate(4, 3, "llm", {"a/all/weight": 0.3}, "ü")]


def test_a_prediction_is_read_from_its_field_and_of_an_older_log_from_the_note() -> None:
    noted = {**CANDIDATE, "origin": "gaussian", "note": "expected -1.5e-05"}
    rows = [noted, {**noted, "expected": 0.25}, {**noted, "expected": None}, {**noted, "origin": "llm"}]
    asked = events.Asked(generation=3, candidates=rows)
    assert [candidate.expected for candidate in asked.read()] == [-1.5e-05, 0.25, None, None]


@pytest.mark.parametrize("place", [4, 7, 9])
def test_a_score_is_read_back_exactly(place: int) -> None:
    event = EXAMPLES[place]
    assert isinstance(event, events.Evaluated | events.Served | events.HeldOut)
    again: Any = events.EVENTS.validate_json(line_of(event))
    assert again.read() == Score(event.score, 0.1, TASKS, event.items)


def test_a_scored_trial_becomes_an_evaluated_event_and_a_failed_one_a_failed_event() -> None:
    good = events.of_result(Result(4, Score(0.5, 0.1, TASKS, 20), seconds={"merge": 0.12345}), 4)
    bad = events.of_result(Result(4, None, "NaN"), 4)
    assert isinstance(good, events.Evaluated)
    assert (good.candidate, good.score, good.tasks, good.seconds) == (4, 0.5, TASKS, {"merge": 0.123})
    assert isinstance(bad, events.Failed)
    assert (bad.candidate, bad.reason) == (4, "NaN")
