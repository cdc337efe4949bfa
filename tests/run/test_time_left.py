"""The time that a run is said to take still, against what it took: the logs are replayed event by event."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

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


WORKERS = 4


def with_workers(speed: Speed, order: str, loading: float = 0.0, pause: float = 0.0) -> list[events.Event]:
    """The log of the same run with workers, which take the next candidate whenever they are free."""
    alone = quickstart(speed)
    now, log = datetime(2026, 1, 1, tzinfo=UTC), list[events.Event]()

    def add(event: events.Event) -> None:
        log.append(event.model_copy(update={"time": now.isoformat()}))

    def score(waiting: Sequence[events.Event]) -> None:
        """Add these scores in the order in which workers finish them."""
        nonlocal now
        free, ends = [now] * WORKERS, list[tuple[datetime, int, events.Event]]()
        for event in waiting:
            assert isinstance(event, events.Scored)
            worker = free.index(min(free))
            free[worker] += timedelta(seconds=sum(event.seconds.values()))
            did = event.model_copy(update={"workers": {f"{worker + 1}": event.items}})
            ends.append((free[worker], worker, did))
        for end, _, event in sorted(ends, key=lambda each: each[:2]):
            now = end
            add(event)

    def search_steadily(waiting: Sequence[events.Evaluated]) -> None:
        """Ask for one candidate whenever a worker is free, the LLM for every third one; tell each when it is scored."""
        nonlocal now
        working, ahead = dict[str, tuple[datetime, events.Evaluated]](), [*waiting]
        while ahead or working:
            free = [worker for worker in workers if worker not in working]
            if ahead and free:
                if len(ahead) % 3 == 0 and speed.llm:
                    now += timedelta(seconds=speed.llm)
                    add(prompted(len(log)).model_copy(update={"seconds": speed.llm}))
                one = ahead.pop(0)
                add(asked(len(log), [one.candidate]))
                working[free[0]] = now + timedelta(seconds=sum(one.seconds.values())), one
            else:
                worker = min(working, key=lambda each: working[each][0])
                end, one = working.pop(worker)
                now = max(now, end)
                add(one.model_copy(update={"workers": {worker: one.items}}))
                add(told(len(log)))

    groups = list[list[events.Event]]()
    for event in alone:
        kinds = (events.Evaluated, events.Selected, events.HeldOut)
        if groups and isinstance(event, kinds) and isinstance(groups[-1][0], type(event)):
            groups[-1].append(event)
        else:
            groups.append([event])
    workers, later = [f"{number + 1}" for number in range(WORKERS)], len(GENERATIONS[0])
    for place, group in enumerate(groups):
        first = group[0]
        match first:
            case events.RunStarted():
                add(first.model_copy(update={"order": order, "workers": WORKERS}))
            case events.Evaluated(candidate=0):
                now += timedelta(seconds=loading)
                for worker in workers:
                    add(events.Worker(worker=worker, change="ready"))
                score(group[:1])
                score(group[1:])
            case events.Evaluated() if order == "steady":
                if first.candidate == later:
                    search_steadily([e for e in alone if isinstance(e, events.Evaluated) and e.candidate >= later])
            case events.Prompted() | events.Asked() | events.Told() if order == "steady" and place > 4:
                pass
            case events.Prompted():
                now += timedelta(seconds=first.seconds)
                add(first)
            case events.Evaluated() if pause and place > len(groups) / 3:
                now, pause = now + timedelta(seconds=pause), 0.0
                for worker in workers:
                    add(events.Worker(worker=worker, change="ready"))
                score(group)
            case events.Selected():
                number = sum(isinstance(event, events.Told) for event in log)
                score([event.model_copy(update={"generation": number}) for event in group])
            case events.Scored():
                score(group)
            case _:
                add(first)
    return log


def settled(log: Sequence[events.Event]) -> list[tuple[float, float, float]]:
    """`times` after the last of the events at each moment."""
    found = times(log)
    return [one for one, after in pairwise([*found, (2.0, -1.0, 0.0)]) if one[1] != after[1]]


@SPEEDS
@pytest.mark.parametrize("order", ["strict", "steady"])
def test_with_workers_the_time_left_is_right_within_a_third_or_an_answer_of_the_llm(speed: Speed, order: str) -> None:
    for share, true, said in settled(with_workers(speed, order)):
        if share >= 1 / 2:
            assert abs(said - true) <= max(true / 3, speed.llm), f"{share:.0%}: {said:.0f} s said, {true:.0f} s true"


def test_neither_a_pause_nor_loading_counts_as_time_of_scoring() -> None:
    log = with_workers(Speed(0.45, 0.28, 0.0294, 2.9), "strict", loading=40.0, pause=3600.0)
    after = [(true, said) for _, true, said in settled(log) if true < 3000]
    assert len(after) > 20
    for true, said in after:
        assert abs(said - true) <= true / 3, f"{said:.0f} s said, {true:.0f} s true"


def test_the_sum_of_the_seconds_of_all_workers_is_not_the_time_that_is_left() -> None:
    speed = Speed(0.1, 0.0, 0.02, 0.0)
    alone, four = (settled(log) for log in (quickstart(speed), with_workers(speed, "strict")))
    said = [next(said for share, _, said in log if share > 0.4) for log in (alone, four)]
    assert said[1] < said[0] / 2


def test_fewer_workers_take_longer() -> None:
    log = with_workers(Speed(0.1, 0.0, 0.02, 0.0), "strict")
    end = next(place for place, event in enumerate(log) if isinstance(event, events.Told) and event.generation == 2) + 1
    lost = [events.Worker(worker=name, change="lost", time=log[end - 1].time) for name in ("1", "2")]
    four, two = (times([*log[:end], *more])[-1][2] for more in ([], lost))
    assert two == pytest.approx(2 * four, rel=0.2)
