"""A pool in virtual time: whatever becomes of its workers, each request has one result, and that is the right one."""

import heapq
import random
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest

from llmevo.errors import MachineError
from llmevo.evaluation.responses import Responses
from llmevo.evaluation.score import Score
from llmevo.workers.pool import Limits, Pool, RunQueue
from llmevo.workers.protocol import Hello, Job, Lost, Message, Notice, Ready, Request
from support.scripted import FACTS, PARTS, ScriptedScoring, expected_score, part_score, recipe_of, whole_score
from support.virtual import Fate, VirtualHost, VirtualWorker

RIVAL = replace(whole_score(Request(0, recipe_of(900))), item_scores={"scripted": [1.0] * sum(PARTS)}, total=1.0)


class Judging(ScriptedScoring):
    """Answers that are judged have the scores of others."""

    def judged(self, job: Job, responses: Responses, run: str) -> Score:
        return part_score(job)


class ManyHeldOut(Judging):
    """The first part of the held-out questions has many."""

    def parts(self, questions: str) -> Sequence[int]:
        return (400, *PARTS[1:]) if questions == "heldout" else PARTS


class OfAScan(Judging):
    """All questions are one part, and count as one."""

    def known(self, request: Request) -> None:
        return None

    def parts(self, questions: str) -> Sequence[int]:
        return [1]


class OneStaysAway(VirtualHost):
    """Worker 1 takes long to read the checksums of the models; the third and fourth workers in the place of 2 do not
    start.
    """

    def launch(self, name: str) -> VirtualWorker:
        worker = VirtualWorker(name, self)
        self.workers.append(worker)
        message = Lost("it does not start") if name in ("2.3", "2.4") else Hello(FACTS, "nowhere")
        heapq.heappush(self.events, (self.now + (1000 if name == "1" else 1), -len(self.workers), worker, message))
        return worker


def desk_of(pool: Pool, host: VirtualHost) -> RunQueue:
    """A run_queue at which waiting for a result without end is an error."""

    @contextmanager
    def waiting() -> Generator[None]:
        assert host.now < 30_000, "no worker does anything"
        yield

    return pool.queue_for(waiting=waiting)


@pytest.mark.parametrize("seeds", [range(first, first + 50) for first in range(0, 200, 50)], ids=str)
def test_whatever_becomes_of_workers_each_request_has_its_result(seeds: range) -> None:
    ended = 0
    for seed in seeds:
        chance = random.Random(seed)
        count = chance.randint(1, 12)
        killers = frozenset(n for n in range(count) if chance.random() < 0.1)
        failing = frozenset(n for n in range(count) if n not in killers and chance.random() < 0.1)
        fate = Fate(chance.choice([0, 0.05, 0.3]), chance.choice([0, 0.02]), killers, failing, seed % 4 == 0)
        host = VirtualHost(chance.randint(1, 5), chance, fate, one_at_a_time=chance.random() < 0.3)
        pool = Pool(host, Judging(), FACTS, Limits(20, 20, 20, 2, 20, 2), clock=host.clock)
        run_queue, notices = desk_of(pool, host), list[Notice]()
        run_queue.observe = notices.append
        requests = [Request(n, recipe_of(n), rivals=[RIVAL] if chance.random() < 0.6 else []) for n in range(count)]
        for request in requests:
            run_queue.submit(request)
        results = {}
        try:
            for _ in requests:
                result = run_queue.result()
                assert result.id not in results, seed
                results[result.id] = result
        except MachineError:
            ended += 1
        finally:
            pool.close()
        lost = Counter(notice.request for notice in notices if notice.change != "ready")
        asked = Counter((job.id, job.part) for _, job in host.asked if job.id != "control")
        for number, result in results.items():
            request, reason = requests[int(number)], result.reason
            if result.score is None and reason.startswith("lost twice"):
                assert result.losses >= 2, seed
            elif number in failing:
                assert reason == f"{number} is no model", seed
            else:
                assert number not in killers, seed
                assert result.score == expected_score(request), seed
            assert result.losses <= lost[number], seed
            of = {part: n for (name, part), n in asked.items() if name == number}
            assert sum(of.values()) - len(of) <= lost[number], seed
        assert fate.death or fate.hang or len(results) == count, seed
    assert ended < len(seeds) / 2


def test_a_recipe_that_killed_two_workers_is_given_up_where_none_starts_in_their_place() -> None:
    host = OneStaysAway(2, random.Random(0), Fate(killers=frozenset({0})))
    pool = Pool(host, Judging(), FACTS, clock=host.clock)
    run_queue, notices = desk_of(pool, host), list[Notice]()
    run_queue.observe = notices.append
    run_queue.submit(Request(0, recipe_of(0)))
    try:
        result = run_queue.result()
    finally:
        pool.close()
    assert result.reason == "lost twice on different workers: the recipe killed it"
    assert [(notice.worker, notice.change) for notice in notices if notice.worker == "1"] == [("1", "ready")]
    assert [notice.worker for notice in notices if notice.change == "refused"] == ["2.4"]


def losses_of(pool: Pool, requests: Sequence[Request]) -> list[Notice]:
    """Have requests scored; return the losses of workers."""
    notices = list[Notice]()
    pool.observe = notices.append
    try:
        for request in requests:
            pool.submit(request)
        assert all(pool.result().score for _ in requests)
    finally:
        pool.close()
    return [notice for notice in notices if notice.change != "ready"]


def test_held_out_questions_may_be_slower_than_those_of_the_search() -> None:
    def seconds(job: Job) -> Mapping[str, float]:
        return {"merge": 5.0, "evaluate": 4000.0 if job.questions == "heldout" and job.part == 0 else 0.1}

    host = VirtualHost(2, random.Random(0), Fate(), seconds=seconds)
    pool = Pool(host, ManyHeldOut(), FACTS, clock=host.clock)
    rows = [Request(f"held-out row {number}", recipe_of(number), "heldout") for number in range(3)]
    assert not losses_of(pool, [Request(number, recipe_of(number)) for number in range(3)] + rows)


def test_workers_may_wait_for_what_the_first_of_them_prepares() -> None:
    jobs = list[Job]()

    def seconds(job: Job) -> Mapping[str, float]:
        jobs.append(job)
        waits = {"prepare": 1200.0} if len(jobs) == 1 else {"evaluate": 1220.0} if len(jobs) <= host.most else {}
        return {"merge": 5.0, **waits}

    host = VirtualHost(4, random.Random(0), Fate(), seconds=seconds)
    pool = Pool(host, Judging(), FACTS, clock=host.clock)
    assert not losses_of(pool, [Request(number, recipe_of(number)) for number in range(8)])


def test_rows_of_a_scan_may_take_long() -> None:
    host = VirtualHost(2, random.Random(0), Fate(), seconds=lambda _: {"evaluate": 720.0})
    pool = Pool(host, OfAScan(), FACTS, Limits(slack=2.0), clock=host.clock)
    assert not losses_of(pool, [Request(number, recipe_of(number)) for number in range(6)])


class Leaving(VirtualHost):
    """The machine of every worker leaves while its engine loads."""

    def will(self, worker: VirtualWorker, message: Message, after: float | None = None) -> None:
        super().will(worker, Lost("it left", left=True) if isinstance(message, Ready) else message, after)


def test_too_many_losses_in_a_row_end_the_session() -> None:
    host = Leaving(2, random.Random(0), Fate())
    pool = Pool(host, Judging(), FACTS, clock=host.clock)
    pool.submit(Request(0, recipe_of(0)))
    try:
        with pytest.raises(MachineError, match="8 workers were lost in a row, the last one because: it left"):
            pool.result()
    finally:
        pool.close()


def test_answers_for_a_judge_may_come_after_their_request_has_failed() -> None:
    for seed in range(20):
        host = VirtualHost(3, random.Random(seed), Fate(failing=frozenset({0}), judged=True))
        pool = Pool(host, Judging(), FACTS, clock=host.clock)
        results = []
        for number in (0, 1):  # the first one's other parts are answered while the second one is scored
            pool.submit(Request(number, recipe_of(number)))
            results.append(pool.result())
        pool.close()
        assert [result.reason for result in results] == ["0 is no model", ""]
        assert results[1].score == whole_score(Request(1, recipe_of(1)))
