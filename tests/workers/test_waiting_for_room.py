"""Workers for which a cluster has no room yet wait, and say so."""

import random
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from llmevo.errors import UserError
from llmevo.workers.pool import Limits, Pool
from llmevo.workers.protocol import Hello, Lost, Notice, Ready, Request
from support.scripted import FACTS, ScriptedScoring, recipe_of, whole_score
from support.virtual import Fate, VirtualHost, VirtualWorker
from support.workers import until

LIMITS = Limits(greeting=20.0, room=100.0, notice=10.0)


@dataclass
class Cluster(VirtualHost):
    """A host in virtual time with room for some workers."""

    rooms: Mapping[float, int] = field(default_factory=dict[float, int])
    """{time from which on: the number of workers for which there is room}"""
    placed: dict[str, float] = field(default_factory=dict[str, float])
    """When each worker got room."""

    @property
    def room(self) -> int:
        return [room for time, room in self.rooms.items() if time <= self.now][-1]

    def launch(self, name: str) -> VirtualWorker:
        worker = VirtualWorker(name, self, is_waiting=True)
        self.workers.append(worker)
        return worker

    def wait(self, workers: Sequence[VirtualWorker], seconds: float) -> Sequence[VirtualWorker]:
        for worker in workers:
            if worker.is_waiting and sum(not each.is_waiting for each in workers) < self.room:
                worker.is_waiting, self.placed[worker.name] = False, self.now
                self.will(worker, Hello(FACTS, "nowhere"))
        return super().wait(workers, seconds)

    def shortage(self) -> str:
        return f"there is room for {self.room}"


@contextmanager
def pool_on(cluster: Cluster) -> Generator[tuple[Pool, list[Notice]]]:
    said = list[Notice]()
    pool = Pool(cluster, ScriptedScoring(), FACTS, LIMITS, said.append, cluster.clock)
    try:
        yield pool, said
    finally:
        pool.close()


def cluster_of(most: int, least: int, rooms: Mapping[float, int]) -> Cluster:
    return Cluster(most, random.Random(0), Fate(), least, rooms=rooms)


def score(pool: Pool, number: int) -> None:
    request = Request(number, recipe_of(number))
    pool.submit(request)
    assert pool.result().score == whole_score(request)


def test_those_without_room_wait_for_any_time_while_others_score() -> None:
    cluster = cluster_of(3, 1, {0: 1, 5000: 3})
    with pool_on(cluster) as (pool, said):
        score(pool, 1)
        until(lambda: all(slot.is_ready for slot in pool.slots))  # one that has waited is not taken for one that hangs
        score(pool, 2)
        assert cluster.placed["2"] >= 5000
        assert cluster.placed["3"] >= 5000
        assert {notice.change for notice in said} == {"ready"}


def test_nothing_is_asked_before_there_are_enough_workers() -> None:
    cluster = cluster_of(3, 2, {0: 1, 50: 2})
    with pool_on(cluster) as (pool, said):
        score(pool, 1)
        assert cluster.placed["2"] >= 50
        assert len(cluster.workers) == 3
        waiting = [notice for notice in said if notice.change == "waiting"]
        assert [(notice.worker, notice.reason) for notice in waiting] == [("2", "there is room for 1")]
        ready = [notice.worker for notice in said if notice.change == "ready"]
        assert sorted(ready) == ["1", "2"]  # before the result


@pytest.mark.parametrize(("least", "room"), [(2, 1), (1, 0)])
def test_a_run_does_not_wait_for_ever(least: int, room: int) -> None:
    cluster = cluster_of(2, least, {0: room})
    with pool_on(cluster) as (pool, _):
        pool.submit(Request(1, recipe_of(1)))
        with pytest.raises(UserError, match=f"there is room for {room}"):
            pool.result()
        assert 100 < cluster.now < 110


def test_a_run_goes_on_with_fewer_workers_than_it_began_with() -> None:
    cluster = cluster_of(2, 2, {0: 2, 1000: 1})
    with pool_on(cluster) as (pool, said):
        score(pool, 1)
        until(lambda: cluster.now > 1000)
        cluster.inbox[cluster.workers[0].name] = Lost("its machine left", left=True)
        now = cluster.now
        until(lambda: cluster.now > now + 1000)
        score(pool, 2)
        assert [notice.change for notice in said if notice.change != "ready"] == ["lost"]


def test_machines_that_leave_while_workers_start_do_not_close_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = cluster_of(1, 1, {0: 1})

    def begin(worker: VirtualWorker) -> None:
        cluster.will(worker, Ready() if len(cluster.workers) == 5 else Lost("its machine left", left=True))

    monkeypatch.setattr(VirtualWorker, "begin", begin)
    with pool_on(cluster) as (pool, _):
        score(pool, 1)
    assert len(cluster.workers) == 5
