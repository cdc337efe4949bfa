"""The order of work: whatever arrives when, a request scores the same, and no part is asked twice but a lost one."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmevo.workers.protocol import Job, Request, Result
from llmevo.workers.schedule import Schedule
from support.scripted import PARTS, ScriptedScoring, expected_score, part_score, recipe_of, whole_score

RIVAL = replace(whole_score(Request(0, recipe_of(900))), item_scores={"scripted": [1.0] * sum(PARTS)}, total=1.0)
"""A rival that gets everything right, so that most raced recipes are stopped."""


def requests_of(raced: list[bool]) -> list[Request]:
    return [Request(n, recipe_of(n), rivals=[RIVAL] if is_raced else []) for n, is_raced in enumerate(raced)]


def test_the_scripted_recipes_are_stopped_after_every_number_of_parts() -> None:
    counts = Counter(expected_score(request).items for request in requests_of([True] * 40))
    assert {*counts} == {4, 6, 9}
    assert min(counts.values()) > 2, counts


@settings(max_examples=150, deadline=None)
@given(
    raced=st.lists(st.booleans(), min_size=1, max_size=6),
    workers=st.integers(1, 5),
    ahead=st.booleans(),
    data=st.data(),
)
def test_results_do_not_depend_on_the_order_of_arrivals_nor_on_losses_nor_on_parts_asked_ahead(
    raced: list[bool], workers: int, ahead: bool, data: st.DataObject
) -> None:
    requests, schedule = requests_of(raced), Schedule(ScriptedScoring())
    busy: dict[str, Job] = {}
    free = [str(number + 1) for number in range(workers)]
    asked, lost = Counter[tuple[Any, int]](), Counter[tuple[Any, int]]()
    results: dict[Any, Result] = {}
    waiting = [*requests]

    def take(result: Result | None) -> None:
        if result:
            assert result.id not in results
            results[result.id] = result

    while len(results) < len(requests):
        while waiting and data.draw(st.booleans() if busy else st.just(True), "add"):
            take(schedule.add(waiting.pop(0)))
        for worker in [*free]:
            if job := schedule.job_for(worker, ahead and data.draw(st.booleans(), "ahead")):
                free.remove(worker)
                busy[worker] = job
                asked[job.id, job.part] += 1
        if not busy:
            assert waiting or len(results) == len(requests), "no worker has anything to do"
            continue
        worker = data.draw(st.sampled_from(sorted(busy)), "answers")
        job = busy.pop(worker)
        if not any(number == job.id for number, _ in lost) and data.draw(st.booleans(), "is lost"):
            lost[job.id, job.part] += 1
            name, _, starts = worker.partition(".")
            free.append(f"{name}.{int(starts or 1) + 1}")
            schedule.lost(worker, job, "it died")
        else:
            free.append(worker)
            take(schedule.answered(worker, job, part_score(job), {"evaluate": 1.0}))
            assert not schedule.further()
    for request in requests:
        result, expected = results[request.id], expected_score(request)
        assert result.score == expected
        losses = sum(count for (number, _), count in lost.items() if number == request.id)
        assert result.losses == losses or (ahead and result.losses < losses)
        if not ahead:  # else some questions are asked in vain
            assert sum(result.workers.values()) == expected.items
            assert result.seconds == {"evaluate": sum(n == request.id for n, _ in (asked - lost).elements())}
    assert all(count == 1 + lost[part] or (ahead and count == lost[part]) for part, count in asked.items())
    assert not any(schedule.job_for(worker) for worker in free)


@settings(max_examples=200, deadline=None)
@given(order=st.permutations(range(len(PARTS))), failing=st.sets(st.sampled_from(range(len(PARTS))), min_size=1))
def test_the_first_part_that_fails_gives_the_reason(order: list[int], failing: set[int]) -> None:
    schedule = Schedule(ScriptedScoring())
    schedule.add(Request(7, recipe_of(7)))
    jobs = {part: schedule.job_for(str(part)) for part in range(len(PARTS))}
    results: list[Result | None] = []
    for part in order:
        job = jobs[part]
        assert job
        if part in failing:
            results.append(schedule.unscorable(str(part), job, f"part {part} is odd", {}))
        else:
            results.append(schedule.answered(str(part), job, part_score(job), {}))
    (result,) = filter(None, results)
    assert (result.score, result.reason) == (None, f"part {min(failing)} is odd")


def begun(*numbers: int) -> Schedule:
    schedule = Schedule(ScriptedScoring())
    for number in numbers:
        schedule.add(Request(number, recipe_of(number), rivals=[RIVAL]))
    return schedule


def job_of(schedule: Schedule, worker: str) -> Job:
    job = schedule.job_for(worker)
    assert job
    return job


def test_a_worker_goes_on_with_the_recipe_that_it_holds() -> None:
    schedule = begun(1, 2, 3)
    first, second = job_of(schedule, "a"), job_of(schedule, "b")
    assert (first.id, second.id) == (1, 2)
    assert schedule.waiting == 1
    assert not schedule.answered("b", second, replace(part_score(second), total=1.0), {})
    assert job_of(schedule, "b") == replace(second, part=1)


def test_a_worker_without_one_takes_a_new_recipe_before_a_begun_one() -> None:
    schedule = Schedule(ScriptedScoring())
    schedule.add(Request(1, recipe_of(1)))
    schedule.add(Request(2, recipe_of(2)))
    jobs = [job_of(schedule, worker) for worker in "abcd"]
    assert [(job.id, job.part) for job in jobs] == [(1, 0), (2, 0), (1, 1), (1, 2)]


def test_a_raced_recipe_is_asked_one_part_at_a_time() -> None:
    schedule = begun(1)
    assert job_of(schedule, "a").part == 0
    assert schedule.job_for("b") is None


def test_a_worker_without_work_asks_a_raced_recipe_the_next_part_ahead() -> None:
    """Answers that came early count only if no part before them stops the recipe."""
    stopped, kept = (
        next(one for one in requests_of([True] * 40) if expected_score(one).items == items)
        for items in (PARTS[0], sum(PARTS))
    )
    for request in (stopped, kept):
        schedule = Schedule(ScriptedScoring())
        schedule.add(request)
        jobs = [schedule.job_for("1"), schedule.job_for("2", ahead=True), schedule.job_for("3", ahead=True)]
        assert [job.part for job in jobs if job] == [0, 1, 2]
        first, *later = filter(None, jobs)
        for job in reversed(later):
            assert schedule.answered("2", job, part_score(job), {}) is None
        result = schedule.answered("1", first, part_score(first), {})
        assert result
        assert result.score == expected_score(request)


def test_a_part_that_kills_workers_is_no_failure_of_a_recipe_that_is_stopped_before() -> None:
    request = next(one for one in requests_of([True] * 40) if expected_score(one).items == PARTS[0])
    schedule = Schedule(ScriptedScoring())
    schedule.add(request)
    first, later = job_of(schedule, "1"), schedule.job_for("2", ahead=True)
    assert later
    schedule.lost("2", later, "it died")
    assert schedule.job_for("3", ahead=True) is None
    result = schedule.answered("1", first, part_score(first), {})
    assert result
    assert (result.score, result.losses) == (expected_score(request), 1)


def test_a_recipe_that_costs_two_workers_is_given_up_when_one_has_answered_since() -> None:
    schedule = begun(1)
    schedule.lost("a", job_of(schedule, "a"), "the first reason")
    assert not schedule.further()
    schedule.lost("b", job_of(schedule, "b"), "the second reason")
    assert schedule.job_for("c") is None
    (result,) = schedule.further()
    assert (result.score, result.losses) == (None, 2)
    assert result.reason == "lost twice on different workers: the first reason; the second reason"
    assert not schedule.further()


def test_workers_that_are_lost_at_the_same_time_count_once() -> None:
    schedule = Schedule(ScriptedScoring())
    schedule.add(Request(1, recipe_of(1)))
    jobs = {name: job_of(schedule, name) for name in "abc"}
    for name, job in jobs.items():
        schedule.lost(name, job, "a power cut")
    assert not schedule.further()
    assert {job_of(schedule, name).part for name in "def"} == {0, 1, 2}


def test_a_recipe_is_rather_not_tried_again_where_it_was_lost() -> None:
    schedule = begun(1, 2, 3)
    schedule.lost("1", job_of(schedule, "1"), "it died")
    assert job_of(schedule, "1.2").id == 2
    assert job_of(schedule, "2").id == 1
    schedule = begun(1)
    schedule.lost("1", job_of(schedule, "1"), "it died")
    assert job_of(schedule, "1.2").id == 1


@pytest.mark.parametrize("raced", [True, False])
def test_an_equal_recipe_waits_for_the_score_of_the_first(raced: bool) -> None:
    schedule, rivals = Schedule(ScriptedScoring()), [RIVAL] if raced else []
    first = Request(1, recipe_of(7), rivals=rivals)
    for number in (1, 2, 3):
        schedule.add(replace(first, id=number))
    schedule.add(replace(first, id=4, questions="heldout"))
    schedule.add(replace(first, id=5, quantize="q8_0"))
    result = None
    while not result:
        job = job_of(schedule, "a")
        assert job.id == 1
        assert not schedule.further()
        result = schedule.answered("a", job, part_score(job), {"evaluate": 1.0})
    assert result.seconds
    assert schedule.further() == [Result(2, expected_score(first)), Result(3, expected_score(first))]
    assert job_of(schedule, "a").id == 4
    rounded = job_of(schedule, "b")
    assert (rounded.id, rounded.quantize) == (5, "q8_0")


def test_an_equal_recipe_is_scored_itself_if_the_first_fails() -> None:
    schedule = Schedule(ScriptedScoring())
    for number in (1, 2, 3):
        schedule.add(Request(number, recipe_of(7)))
    for number in (1, 2, 3):
        job = job_of(schedule, "a")
        assert job.id == number
        assert schedule.unscorable("a", job, "it is no model", {}) == Result(
            number, None, "it is no model", {}, {"a": 0}
        )
        assert not schedule.further()


def test_a_known_score_needs_no_worker() -> None:
    scoring = ScriptedScoring()
    request = Request(1, recipe_of(1))
    scoring.keep(request, whole_score(request))
    assert Schedule(scoring).add(request) == Result(1, whole_score(request))


@pytest.mark.parametrize("raced", [True, False])
def test_a_recipe_that_was_stopped_goes_on_where_it_stopped(raced: bool) -> None:
    number = next(n for n in range(50) if expected_score(Request(n, recipe_of(n), rivals=[RIVAL])).items == PARTS[0])
    stopped = Request(number, recipe_of(number), rivals=[RIVAL])
    scoring = ScriptedScoring()
    scoring.keep(stopped, expected_score(stopped))
    schedule = Schedule(scoring)
    if raced:  # against the same rival it stops there again
        result = schedule.add(stopped)
        assert result
        assert (result.score, result.seconds) == (expected_score(stopped), {})
        return
    assert schedule.add(replace(stopped, rivals=())) is None
    parts = [job_of(schedule, name) for name in "ab"]
    assert [job.part for job in parts] == [1, 2]
    assert schedule.answered("b", parts[1], part_score(parts[1]), {}) is None
    result = schedule.answered("a", parts[0], part_score(parts[0]), {})
    assert result
    assert result.score == whole_score(stopped)
    assert scoring.known(stopped) == whole_score(stopped)
