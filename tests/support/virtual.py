"""A host in virtual time: workers of a pool that live in this process, and whose durations cost nothing."""

import heapq
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from llmevo.evaluation.responses import Responses
from llmevo.workers.protocol import Answered, Hello, Job, Lost, Message, Ready, Unscorable
from support.scripted import FACTS, PARTS, part_score


@dataclass
class Fate:
    """How often workers fail, and which recipes are at fault."""

    death: float = 0.0
    """The chance that a worker is lost, in each thing that it does."""
    hang: float = 0.0
    killers: frozenset[int | str] = frozenset()
    failing: frozenset[int | str] = frozenset()
    """In their first part."""
    judged: bool = False
    """Whether the answers are left to a judge."""


@dataclass
class VirtualWorker:
    name: str
    host: "VirtualHost"
    alive: bool = True
    is_waiting: bool = False

    def begin(self) -> None:
        self.host.will(self, Ready())

    def send(self, job: Job) -> None:
        assert self.alive
        self.host.asked.append((self.name, job))
        if job.id in self.host.fate.killers:
            self.host.will(self, Lost("the recipe killed it"))
        elif job.id in self.host.fate.failing and not job.part:
            self.host.will(self, Unscorable(f"{job.id} is no model", {"evaluate": 1.0}))
        else:
            answers = Responses(PARTS[job.part]) if self.host.fate.judged else part_score(job)
            seconds = self.host.seconds(job) if self.host.seconds else {"merge": 0.1, "evaluate": 1.0}
            self.host.will(self, Answered(answers, seconds), sum(seconds.values()) if self.host.seconds else None)

    def receive(self) -> Message:
        return self.host.inbox.pop(self.name)

    def kill(self) -> None:
        assert self.alive, "it is killed twice"
        self.alive = False
        self.host.inbox.pop(self.name, None)


@dataclass
class VirtualHost:
    """A `Host`; its clock goes on while a pool waits."""

    most: int
    random: random.Random
    fate: Fate
    least: int = 1
    one_at_a_time: bool = False
    seconds: Callable[[Job], Mapping[str, float]] | None = None
    """Of each kind of work that a job takes; by default a job takes a random time."""
    now: float = 0.0
    events: list[tuple[float, int, VirtualWorker, Message]] = field(
        default_factory=list[tuple[float, int, VirtualWorker, Message]]
    )
    workers: list[VirtualWorker] = field(default_factory=list[VirtualWorker])
    inbox: dict[str, Message] = field(default_factory=dict[str, Message])
    asked: list[tuple[str, Job]] = field(default_factory=list[tuple[str, Job]])
    count: int = 0

    def clock(self) -> float:
        return self.now

    def will(self, worker: VirtualWorker, message: Message, after: float | None = None) -> None:
        """A worker gives a message after a time, by default a random one, or is lost, or never does."""
        if self.random.random() < self.fate.hang:
            return
        if self.random.random() < self.fate.death:
            message = Lost("fate")
        self.count += 1
        after = self.random.lognormvariate(0, 1) if after is None else after
        heapq.heappush(self.events, (self.now + after, self.count, worker, message))

    def launch(self, name: str) -> VirtualWorker:
        worker = VirtualWorker(name, self)
        self.workers.append(worker)
        self.will(worker, Hello(FACTS, "nowhere"))
        return worker

    def wait(self, workers: Sequence[VirtualWorker], seconds: float) -> Sequence[VirtualWorker]:
        assert all(worker.alive for worker in workers)
        end = self.now + seconds
        while self.events and self.events[0][0] <= end and not self.inbox:
            self.now, _, worker, message = heapq.heappop(self.events)
            if worker.alive:
                self.inbox[worker.name] = message
        if not self.inbox:
            self.now = end
            if not self.events:
                time.sleep(0.0002)  # the run's thread has something to do
        return [worker for worker in workers if worker.name in self.inbox]

    def wake(self) -> None:
        pass

    def shortage(self) -> str:
        return ""

    def close(self) -> None:
        assert not any(worker.alive for worker in self.workers)
