"""The time that a run is said to take still, against what it took: the logs are replayed event by event."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from llmevo.config import parse_config
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.progress import left
from support.made_logs import asked, evaluated, finished, folded, held_out, prompted, started, told

GENERATIONS = (
    (160, 35, 35, 35, 35),
    (130, 70, 70, 70, 35, 160),
    (160, 35, 70, 130, 35, 160),
    (160, 70, 35, 160, 35, 70),
    (100, 100, 160, 100, 70, 70),
    (130, 130, 100, 100, 160, 70),
)
"""Questions that the candidates of a quickstart were asked, until they were stopped."""
PARTS = {35: 1, 70: 2, 100: 3, 130: 4, 160: 5}
FINALISTS = 6
PARENTS = ("one", "two", "three", "four")


@dataclass(frozen=True)
class Speed:
    """What a machine takes, in seconds."""

    merge: float
    call: float
    """For every call of the engine, however many questions are asked in it."""
    question: float
    llm: float
    """For an answer of the LLM."""

    def scoring(self, items: int, calls: int = 1) -> dict[str, float]:
        return {"merge": self.merge, "evaluate": calls * self.call + items * self.question}


def quickstart(speed: Speed, llm_fails: bool = False) -> list[events.Event]:
    """The log of a run of 35 candidates, raced, with finals and held-out rows, at this speed."""
    now, log = datetime(2026, 1, 1, tzinfo=UTC), list[events.Event]()

    def add(event: events.Event, seconds: float = 0.0) -> None:
        nonlocal now
        now += timedelta(seconds=seconds)
        log.append(event.model_copy(update={"time": now.isoformat()}))

    def add_scored(event: events.Event, seconds: dict[str, float], **changes: object) -> None:
        add(event.model_copy(update={"seconds": seconds, **changes}), sum(seconds.values()))

    genome = {"base_model": "base", "models": [*PARENTS], "merge_method": "task_arithmetic"}
    first = started(35, genome=genome)
    sizes = {"items": 160, "selection_items": 160, "heldout_items": 640, "genes": first.genes * 8}
    add(first.model_copy(update=sizes))
    place = 0
    for number, generation in enumerate(GENERATIONS):
        if number > 1:
            answer = {"seconds": speed.llm, **({"reply": None, "used": 0} if llm_fails else {})}
            add(prompted(number).model_copy(update=answer), speed.llm)
        places = [*range(place, place + len(generation))]
        start = asked(0, places, "parent", ("", *PARENTS))
        start.candidates[0]["origin"] = "uniform"
        add(asked(number, places) if number else start)
        for candidate, items in zip(places, generation, strict=True):
            score = 0.5 + candidate / 100
            add_scored(evaluated(candidate, score), speed.scoring(items, PARTS[items]), items=items)
        add(told(number))
        place += len(generation)
    for candidate in range(place - FINALISTS, place):
        scored = evaluated(candidate, 0.5).model_dump(exclude={"event", "time", "schema_", "rival", "proxy", "items"})
        final = events.Selected(**scored, items=160, generation=len(GENERATIONS), finalists=FINALISTS)
        add_scored(final, speed.scoring(160))
    rows = [("base", "base"), *((name, "parent") for name in PARENTS), ("uniform", "uniform"), ("best", "best")]
    best = folded(log).best
    assert best
    for row, kind in rows:
        candidate = best.candidate.id if kind == "best" else None
        add_scored(held_out(row, kind, 0.5), speed.scoring(640), items=640, candidate=candidate)
    add(finished(best.candidate.id, 0.9))
    return log


def taken_over(log: Sequence[events.Event]) -> list[events.Event]:
    """The log of an equal run in the same comparison: start rows and held-out rows but the best take no time."""
    earlier, found = timedelta(), list[events.Event]()
    for event in log:
        known = isinstance(event, events.Evaluated) and event.candidate < len(GENERATIONS[0])
        if known or (isinstance(event, events.HeldOut) and event.kind != "best"):
            assert isinstance(event, events.Scored)
            earlier += timedelta(seconds=sum(event.seconds.values()))
            event = event.model_copy(update={"seconds": {}})
        time = datetime.fromisoformat(event.time) - earlier
        found.append(event.model_copy(update={"time": time.isoformat()}))
    return found


def times(log: Sequence[events.Event], others: Sequence[RunState] = ()) -> list[tuple[float, float, float]]:
    """At every event: the share of the run that is over, what is left of it, and what was said to be left."""
    moments = [datetime.fromisoformat(event.time) for event in log]
    whole = (moments[-1] - moments[0]).total_seconds()
    state, found = RunState(), list[tuple[float, float, float]]()
    for moment, event in zip(moments, log, strict=True):
        state.apply(event)
        assert state.started
        said = left(state, parse_config(state.started.config, "test"), others).after()
        found.append(((moment - moments[0]).total_seconds() / whole, (moments[-1] - moment).total_seconds(), said))
    return found


SPEEDS = pytest.mark.parametrize(
    "speed",
    [
        pytest.param(Speed(0.45, 0.28, 0.0294, 2.9), id="as measured on one thread"),
        pytest.param(Speed(0.3, 0.28, 0.016, 2.9), id="calls cost more than questions"),
        pytest.param(Speed(0.1, 0.0, 0.02, 0.0), id="only questions cost"),
        pytest.param(Speed(2.0, 0.1, 0.002, 1.0), id="merging costs most"),
        pytest.param(Speed(0.45, 0.28, 0.0294, 60.0), id="a slow LLM"),
    ],
)


@SPEEDS
def test_from_a_third_of_a_run_on_the_time_left_is_right_within_a_quarter(speed: Speed) -> None:
    for share, true, said in times(quickstart(speed)):
        if share >= 1 / 3:
            assert abs(said - true) <= 0.25 * true, f"{share:.0%}: {said:.0f} s said, {true:.0f} s true"


@SPEEDS
def test_what_another_run_of_a_comparison_knows_already_takes_no_time(speed: Speed) -> None:
    log = quickstart(speed)
    for share, true, said in times(taken_over(log), [folded(log)]):
        if share >= 1 / 3:
            assert abs(said - true) <= 0.25 * true, f"{share:.0%}: {said:.0f} s said, {true:.0f} s true"
