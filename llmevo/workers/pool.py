"""Workers that score in parallel: started, watched, given work, and started again when they are lost.

A loss is never the candidate's fault: its part is done elsewhere, and the search does not see it. See `schedule` for
the order of work, and `protocol.Host` for where workers run.
"""

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from llmevo.errors import CandidateError, LlmevoError, MachineError, UserError, plural
from llmevo.evaluation.responses import Responses
from llmevo.workers.protocol import (
    Answered,
    Doing,
    Hello,
    Host,
    Job,
    Lost,
    Message,
    Notice,
    Ready,
    Refused,
    Request,
    Result,
    Scoring,
    Unscorable,
    Worker,
)
from llmevo.workers.schedule import Schedule

TICK = 0.2
"""Seconds between two looks at the time limits."""


@dataclass(frozen=True)
class Limits:
    """When a worker that says nothing counts as hung. In seconds."""

    greeting: float = 3600.0
    """For its process to start, import its libraries, and read the checksums of the models."""
    loading: float = 3600.0
    """For its engine to load and be checked."""
    unmeasured: float = 3600.0
    """For a part of a set of questions of which no part is answered yet, or more: see `question`."""
    question: float = 30.0
    """For each question of such a part."""
    least: float = 600.0
    slack: float = 20.0
    """So many times as long as the slowest so far, a question. A candidate that never stops writing is slow, not lost.
    """
    room: float = 1800.0
    """For the cluster to have room for it, while there are too few others to go on."""
    notice: float = 60.0
    """The same, until that is said."""


class Stage(Enum):
    WAITING = "waiting for room"
    GREETING = "starting"
    LOADING = "loading"
    TESTED = "being tested"
    IDLE = "idle"
    BUSY = "scoring"


AT_WORK = {Stage.GREETING, Stage.LOADING, Stage.TESTED, Stage.BUSY}
"""Stages that end with an answer, or with the loss of the worker after a time."""


@dataclass
class Slot:
    """The place of one worker; a new one takes it when the worker is lost."""

    number: int
    worker: Worker | None = None
    stage: Stage = Stage.GREETING
    since: float = 0.0
    job: Job | None = None
    limit: float = 0.0
    """The seconds after which it counts as hung, by what was known when its job was handed out."""
    failures: int = 0
    """Starts that failed, in a row."""
    starts: int = 0
    place: str = ""
    welcomed: str = ""
    """The name of its last worker that could score."""
    closed: bool = False
    """No worker is started here any more."""

    @property
    def is_ready(self) -> bool:
        return self.worker is not None and self.stage in (Stage.IDLE, Stage.BUSY)


@dataclass
class _Pace:
    """The time that parts take."""

    question: dict[str, float] = field(default_factory=dict[str, float])
    """{set of questions: the longest time of one of them so far}."""
    merge: float = 0.0

    def add(self, questions: str, count: int, took: float, seconds: Mapping[str, float]) -> None:
        """Take in the time of a part of a set of questions."""
        merge = seconds.get("merge", 0.0)
        each = (took - merge - seconds.get("prepare", 0.0)) / max(1, count)
        self.question[questions] = max(self.question.get(questions, 0.0), each)
        self.merge = max(self.merge, merge)


@dataclass(frozen=True)
class Unjudged:
    """A worker's answers whose score needs a judge."""

    worker: str
    job: Job
    responses: Responses
    seconds: Mapping[str, float]


Item = Result | Notice | Unjudged | BaseException


class RunQueue:
    """Where a run submits its requests to a pool and takes their results; several runs may share a pool."""

    def __init__(self, pool: "Pool", run: str, waiting: Callable[[], AbstractContextManager[None]]) -> None:
        """`waiting` is entered while there is no result."""
        self.observe: Callable[[Notice], None] = lambda _: None
        self.box = queue.SimpleQueue[Item]()
        self.waits = False
        """Whether the run waits for a result, so that no request is to come before it."""
        self._pool, self._run, self._waiting = pool, run, waiting

    @property
    def count(self) -> int:
        return self._pool.count

    @property
    def free(self) -> int:
        return self._pool.free

    def submit(self, request: Request) -> None:
        self._pool.take(request, self)

    def result(self) -> Result:
        if self.box.empty():
            self.waits = True
            self._pool.wake()
        while True:
            try:
                with self._waiting():
                    found = self.box.get(timeout=1.0)  # with a time limit, so that Ctrl-C is heard
            except queue.Empty:
                continue
            if isinstance(found, Notice):
                self.observe(found)
            elif isinstance(found, BaseException):
                self.box.put(found)  # for the next caller
                raise found
            elif isinstance(found, Result):
                self.waits = False
                return found
            else:
                self._pool.judge(found, self._run)

    def close(self) -> None:
        """Take no more results."""
        self._pool.leave(self)


class Pool:
    """Workers on a host. A thread of its own serves them, so they go on while the LLM is asked.

    A worker that takes the place of a lost one is tested first, with `Scoring.control`: so a machine that loses every
    worker is told from a recipe that kills engines. Where no such worker starts, one that has no work is tested.
    """

    def __init__(
        self,
        host: Host[Any],
        scoring: Scoring,
        facts: Mapping[str, Any],
        limits: Limits | None = None,
        observe: Callable[[Notice], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`facts` decide scores: a worker with others than these is refused."""
        self.observe, self._clock = observe, clock
        self._host, self._scoring, self._limits = host, scoring, limits or Limits()
        self._facts = facts
        self._schedule = Schedule(scoring)
        self._using = threading.RLock()
        """Held while the schedule and the queues are used: by the pool's thread, and by those of runs."""
        self._slots = [Slot(number) for number in range(1, host.most + 1)]
        self._pace = _Pace()
        self._told = set[str]()
        """The warnings of workers so far."""
        self._losses = Counter[int | str | None]()
        """{request, None for those without: workers lost since the last answer of a candidate}."""
        self._gathered = False
        """There were as many workers at once as it takes to begin."""
        self._short_since, self._short_said = self._clock(), False
        self._inbox = queue.SimpleQueue[Request]()
        self._queues: list[RunQueue] = []
        self._owners: dict[int | str, RunQueue] = {}
        """{id of an open request: where its result is taken}."""
        self._error: BaseException | None = None
        """Why the pool has ended."""
        self._own = self.queue_for()
        self._own.observe = lambda notice: self.observe(notice)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="llmevo-workers", daemon=True)
        self._thread.start()

    # For the run

    @property
    def count(self) -> int:
        return self._host.most

    @property
    def free(self) -> int:
        return max(0, sum(not slot.closed for slot in self._slots) - len(self._owners))

    @property
    def slots(self) -> list[Slot]:
        """The workers, for a display."""
        return self._slots

    @property
    def doing(self) -> list[Doing]:
        """What each worker does now; it may change while it is read."""
        found: list[Doing] = []
        for slot in self._slots:
            job, stage = slot.job, "left out" if slot.closed else slot.stage.value
            found.append(Doing(f"{slot.number}", stage, slot.since, job.id if job else None))
        return found

    def submit(self, request: Request) -> None:
        self._own.submit(request)

    def result(self) -> Result:
        return self._own.result()

    # For several runs

    def queue_for(self, run: str = "", waiting: Callable[[], AbstractContextManager[None]] = nullcontext) -> RunQueue:
        """Return a place for the requests of a run; their ids are unique among those of all runs."""
        made = RunQueue(self, run, waiting)
        with self._using:
            self._queues.append(made)
            if self._error:
                made.box.put(self._error)
        return made

    def wake(self) -> None:
        """Have free workers look for work again."""
        self._host.wake()

    def leave(self, run_queue: RunQueue) -> None:
        with self._using:
            self._queues.remove(run_queue)

    def take(self, request: Request, run_queue: RunQueue) -> None:
        """Queue a request."""
        with self._using:
            self._owners[request.id] = run_queue
        self._inbox.put(request)
        self._host.wake()

    def judge(self, answers: Unjudged, run: str) -> None:
        """Have the answers to a part judged, in the thread of the run."""
        worker, job = answers.worker, answers.job
        with self._using:
            if not self._schedule.is_open(job):  # another part has failed
                return
        started = time.monotonic()

        def seconds() -> dict[str, float]:
            """With those of the judges, which are part of scoring as in a run without workers."""
            scoring = answers.seconds.get("evaluate", 0.0) + time.monotonic() - started
            return {**answers.seconds, "evaluate": scoring}

        try:
            score = self._scoring.judged(job, answers.responses, run)
        except CandidateError as error:
            with self._using:
                self._give(self._schedule.unscorable(worker, job, str(error), seconds()))
                self._give_further()
        else:
            with self._using:
                self._give(self._schedule.answered(worker, job, score, seconds()))
                self._give_further()
        self._host.wake()  # its next part may be asked now

    def close(self) -> None:
        self._stop.set()
        self._host.wake()
        self._thread.join()

    # The thread

    def _serve(self) -> None:
        try:
            while not self._stop.is_set():
                with self._using:
                    self._take_requests()
                    self._start_workers()
                    self._hand_out()
                slots = {id(slot.worker): slot for slot in self._slots}
                for worker in self._host.wait([slot.worker for slot in self._slots if slot.worker], TICK):
                    message = worker.receive()
                    with self._using:
                        self._take(slots[id(worker)], message)
                with self._using:
                    self._check_time()
        except BaseException as error:  # it is raised by `result`
            with self._using:
                self._error = error
                for run_queue in self._queues:
                    run_queue.box.put(error)
        finally:
            for slot in self._slots:
                if slot.worker:
                    slot.worker.kill()
            self._host.close()

    def _take_requests(self) -> None:
        while not self._inbox.empty():
            self._give(self._schedule.add(self._inbox.get()))

    def _give(self, result: Result | None) -> None:
        if result:
            self._losses.pop(result.id, None)  # a request that is given up was at fault, not the machine
            run_queue = self._owners.pop(result.id)
            run_queue.waits = False
            run_queue.box.put(result)

    def _give_further(self) -> None:
        for result in self._schedule.further():
            self._give(result)

    def _start_workers(self) -> None:
        for slot in self._slots:
            starting = any(each.worker and not each.is_ready for each in self._slots)
            if slot.worker is None and not slot.closed and not (self._host.one_at_a_time and starting):
                slot.starts += 1
                again = f".{slot.starts}" if slot.starts > 1 else ""
                slot.worker = self._host.launch(f"{slot.number}{again}")
                self._set(slot, Stage.GREETING)

    def _hand_out(self) -> None:
        self._gathered = self._gathered or self._count_ready >= self._host.least
        queues = [run_queue for run_queue in self._queues if run_queue is not self._own] or [self._own]
        ahead = all(run_queue.waits for run_queue in queues)  # no request is to come before the next result
        for slot in self._slots:
            if not (slot.worker and slot.stage is Stage.IDLE and self._gathered):
                continue
            if job := self._schedule.job_for(slot.worker.name, ahead):
                slot.job, slot.limit = job, self._limit(job)
                self._set(slot, Stage.BUSY)
                slot.worker.send(job)
        if self._schedule.awaits_answer and not any(slot.stage in AT_WORK for slot in self._slots if slot.worker):
            idle = (slot for slot in self._slots if slot.worker and slot.stage is Stage.IDLE)
            if slot := next(idle, None):
                self._test(slot)

    def _test(self, slot: Slot) -> None:
        assert slot.worker
        slot.limit = self._limit(None)
        self._set(slot, Stage.TESTED)
        slot.worker.send(self._scoring.control())

    def _warn(self, warnings: Sequence[str]) -> None:
        """Tell the user once what several workers say."""
        for text in warnings:
            if text not in self._told:
                self._told.add(text)
                self._scoring.warn(text)

    def _set(self, slot: Slot, stage: Stage) -> None:
        slot.stage, slot.since = stage, self._clock()

    def _take(self, slot: Slot, message: Message) -> None:
        assert slot.worker
        name, job = slot.worker.name, slot.job
        if isinstance(message, Ready | Answered | Unscorable):
            self._warn(message.warnings)
        match message:
            case Hello(facts=facts, place=place):
                slot.place = place
                if others := [*differences(self._facts, facts)]:
                    self._refuse(slot, f"it differs from this machine: {'; '.join(others)}")
                else:
                    self._set(slot, Stage.LOADING)
                    slot.worker.begin()
            case Ready() if slot.starts > 1:
                self._test(slot)
            case Answered() | Unscorable() if slot.stage is Stage.TESTED:
                self._give_further()
                self._welcome(slot)
            case Ready():
                self._welcome(slot)
            case Answered(score=score, seconds=seconds) if job:
                took, slot.job = self._clock() - slot.since, None
                self._losses.clear()
                count = self._scoring.parts(job.questions)[job.part]  # as in `_limit`: a scan counts 1, its score more
                self._pace.add(job.questions, count, took, seconds)
                self._set(slot, Stage.IDLE)
                if isinstance(score, Responses):
                    if run_queue := self._owners.get(job.id):  # else another part has failed
                        run_queue.box.put(Unjudged(name, job, score, seconds))
                else:
                    self._give(self._schedule.answered(name, job, score, seconds))
                self._give_further()
            case Unscorable(reason=reason, seconds=seconds) if job:
                slot.job = None
                self._losses.clear()
                self._set(slot, Stage.IDLE)
                self._give(self._schedule.unscorable(name, job, reason, seconds))
                self._give_further()
            case Refused(reason=reason) | Unscorable(reason=reason):
                self._refuse(slot, reason)
            case Lost(reason=reason, left=left):
                self._lose(slot, reason, left)
            case _:
                self._lose(slot, f"it sent {message!r}, which nothing had asked for")

    def _welcome(self, slot: Slot) -> None:
        assert slot.worker
        slot.failures = 0
        self._set(slot, Stage.IDLE)
        if slot.welcomed != slot.worker.name:  # else it was tested again
            slot.welcomed = slot.worker.name
            self._note(Notice(worker=slot.worker.name, change="ready", place=slot.place))

    def _lose(self, slot: Slot, reason: str, left: bool = False) -> None:
        """Give a lost worker's job to others, and start another worker, unless two starts in a row failed."""
        assert slot.worker
        worker, job, started = slot.worker, slot.job, slot.is_ready
        worker.kill()
        slot.worker, slot.job = None, None
        request = job.id if job else None
        self._losses[request] += 1
        slot.failures += not (started or left)
        change = "refused" if slot.failures > 1 else "lost"
        self._note(Notice(worker=worker.name, change=change, place=slot.place, reason=reason, request=request))
        if job:
            self._schedule.lost(worker.name, job, reason)
        if slot.failures > 1:
            self._shut(slot, f"worker {slot.number} did not start twice: {reason}", MachineError)
        elif (lost := self._losses.total()) >= 2 * sum(not each.closed for each in self._slots) + 4:
            raise MachineError(f"{plural(lost, 'worker')} were lost in a row, the last one because: {reason}", "engine")

    def _refuse(self, slot: Slot, reason: str) -> None:
        assert slot.worker
        worker = slot.worker
        worker.kill()
        job, slot.worker, slot.job = slot.job, None, None
        self._note(Notice(worker=worker.name, change="refused", place=slot.place, reason=reason))
        if job:
            self._schedule.lost(worker.name, job, reason)
        place = f" ({slot.place})" if slot.place else ""
        self._shut(slot, f"worker {worker.name}{place} cannot be used: {reason}", UserError)

    def _shut(self, slot: Slot, reason: str, error: type[LlmevoError]) -> None:
        """Leave a slot without a worker. Raises an error when too few are left."""
        slot.closed = True
        if sum(not each.closed for each in self._slots) < self._host.least:
            raise error(reason)

    def _note(self, notice: Notice) -> None:
        for run_queue in self._queues:
            run_queue.box.put(notice)

    @property
    def _count_ready(self) -> int:
        return sum(slot.is_ready for slot in self._slots)

    def _check_time(self) -> None:
        self._check_room()
        now, limits = self._clock(), self._limits
        for slot in self._slots:
            spent = now - slot.since
            if slot.worker is None or slot.stage in (Stage.IDLE, Stage.WAITING):
                continue
            if slot.stage is Stage.GREETING:
                late = spent > limits.greeting
            elif slot.stage is Stage.LOADING:
                late = spent > limits.loading
            else:
                late = spent > max(slot.limit, self._limit(slot.job))
            if late:
                doing = f"{slot.stage.value} for {spent:.0f} s without an answer"
                self._lose(slot, f"it hung ({doing})")

    def _check_room(self) -> None:
        """Let workers wait for room: for any time while there are others to go on with, else up to a limit."""
        slots = [(slot, slot.worker) for slot in self._slots if slot.worker]
        for slot, worker in slots:
            if worker.is_waiting != (slot.stage is Stage.WAITING):
                self._set(slot, Stage.WAITING if worker.is_waiting else Stage.GREETING)
        waiting = [worker.name for _, worker in slots if worker.is_waiting]
        now, needed = self._clock(), 1 if self._gathered else self._host.least
        if not waiting or len(slots) - len(waiting) >= needed:
            self._short_since, self._short_said = now, False
        elif now - self._short_since > self._limits.room:
            raise UserError(self._host.shortage())
        elif now - self._short_since > self._limits.notice and not self._short_said:
            self._short_said = True
            self._note(Notice(worker=waiting[0], change="waiting", reason=self._host.shortage()))

    def _limit(self, job: Job | None) -> float:
        """The seconds after which a worker with a job, or with the control, counts as hung, from the speed so far."""
        limits, pace = self._limits, self._pace
        questions, part = (job.questions, job.part) if job else ("search", 0)
        count = self._scoring.parts(questions)[part]
        if questions in pace.question:
            least, each = limits.least, pace.question[questions]
        else:  # of other tasks, which may be slower
            least = max(limits.unmeasured, limits.question * count)
            each = max(pace.question.values(), default=0.0)
        return max(least, limits.slack * (pace.merge + count * each))


def differences(own: Mapping[str, Any], other: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Yield the facts in which a worker differs, each as a text that names it."""
    for key in sorted({*own, *other}):
        one, two, name = own.get(key), other.get(key), f"{place}{key}"
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            yield from differences(one, two, f"{name} ")
        elif one != two:
            yield f"{name} is {_short(two)} there and {_short(one)} here"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:20] + "…"
