"""Workers that score in parallel: started, watched, given work, and started again when they are lost.

A loss is never the candidate's fault: its part is done elsewhere, and the search does not see it. See `schedule` for
the order of work, and `protocol.Host` for where workers run.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from llmevo.errors import CandidateError, LlmevoError, MachineError, UserError, plural
from llmevo.evaluation.responses import Responses
from llmevo.workers.protocol import (
    Answered,
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

    greeting: float = 300.0
    """For its process to start, import its libraries, and read the checksums of the models."""
    loading: float = 3600.0
    """For its engine to load and be checked."""
    unmeasured: float = 3600.0
    """For the first part that any worker answers."""
    least: float = 60.0
    slack: float = 5.0
    """So many times as long as the slowest so far, a question."""


class Stage(Enum):
    GREETING = "starting"
    LOADING = "loading"
    IDLE = "idle"
    BUSY = "scoring"


@dataclass
class Slot:
    """The place of one worker; a new one takes it when the worker is lost."""

    number: int
    worker: Worker | None = None
    stage: Stage = Stage.GREETING
    since: float = 0.0
    job: Job | None = None
    failures: int = 0
    """Starts that failed, in a row."""
    starts: int = 0
    place: str = ""
    closed: bool = False
    """No worker is started here any more."""

    @property
    def is_ready(self) -> bool:
        return self.worker is not None and self.stage in (Stage.IDLE, Stage.BUSY)


@dataclass
class _Pace:
    """The time that parts take."""

    question: float = 0.0
    """The longest time of a question so far."""
    merge: float = 0.0
    measured: bool = False

    def add(self, seconds: Mapping[str, float], took: float, questions: int) -> None:
        merge = seconds.get("merge", 0.0)
        self.question = max(self.question, (took - merge) / max(1, questions))
        self.merge, self.measured = max(self.merge, merge), True


@dataclass(frozen=True)
class Unjudged:
    """A worker's answers whose score needs a judge."""

    worker: str
    job: Job
    responses: Responses
    seconds: Mapping[str, float]


class Pool:
    """Workers on a host. A thread of its own serves them, so they go on while the LLM is asked."""

    def __init__(
        self,
        host: Host[Any],
        scoring: Scoring,
        facts: Mapping[str, Any],
        limits: Limits | None = None,
        observe: Callable[[Notice], None] = lambda _: None,
    ) -> None:
        """`facts` decide scores: a worker with others than these is refused."""
        self.observe = observe
        self._host, self._scoring, self._limits = host, scoring, limits or Limits()
        self._facts = facts
        self._schedule = Schedule(scoring)
        self._using = threading.RLock()
        """Held while the schedule is used: by the pool's thread, and by the one that takes results where it judges."""
        self._slots = [Slot(number) for number in range(1, host.most + 1)]
        self._pace = _Pace()
        self._losses = 0
        """Workers lost since the last answer."""
        self._begun = time.monotonic()
        self._inbox = queue.SimpleQueue[Request]()
        self._outbox = queue.SimpleQueue[Result | Notice | Unjudged | BaseException]()
        self._ready, self._refusal = threading.Event(), ""
        self._open = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="llmevo-workers", daemon=True)
        self._thread.start()

    # For the run

    @property
    def count(self) -> int:
        return self._host.most

    @property
    def free(self) -> int:
        return max(0, sum(not slot.closed for slot in self._slots) - self._open)

    @property
    def slots(self) -> list[Slot]:
        """The workers, for a display."""
        return self._slots

    def submit(self, request: Request) -> None:
        self._open += 1
        self._inbox.put(request)
        self._host.wake()

    def result(self) -> Result:
        while True:
            try:
                found = self._outbox.get(timeout=1.0)  # with a time limit, so that Ctrl-C is heard
            except queue.Empty:
                continue
            if isinstance(found, Notice):
                self.observe(found)
            elif isinstance(found, BaseException):
                self._outbox.put(found)  # for the next caller
                raise found
            else:
                result = self._judged(found) if isinstance(found, Unjudged) else found
                if result:
                    self._open -= 1
                    return result

    def _judged(self, answers: Unjudged) -> Result | None:
        """Have the answers to a part judged, and return the result of its request if that is complete or stopped."""
        worker, job, seconds = answers.worker, answers.job, answers.seconds
        with self._using:
            if not self._schedule.is_open(job):  # another part has failed
                return None
        try:
            score = self._scoring.judged(job, answers.responses)
        except CandidateError as error:
            with self._using:
                return self._schedule.unscorable(worker, job, str(error), seconds)
        with self._using:
            result = self._schedule.answered(worker, job, score, seconds)
        self._host.wake()  # its next part may be asked now
        return result

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
            self._outbox.put(error)
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
            self._outbox.put(result)

    def _start_workers(self) -> None:
        for slot in self._slots:
            starting = any(each.worker and not each.is_ready for each in self._slots)
            if slot.worker is None and not slot.closed and not (self._host.one_at_a_time and starting):
                slot.starts += 1
                again = f".{slot.starts}" if slot.starts > 1 else ""
                slot.worker = self._host.launch(f"{slot.number}{again}")
                self._set(slot, Stage.GREETING)

    def _hand_out(self) -> None:
        for slot in self._slots:
            if slot.worker and slot.stage is Stage.IDLE and (job := self._schedule.job_for(slot.worker.name)):
                slot.job = job
                self._set(slot, Stage.BUSY)
                slot.worker.send(job)

    def _set(self, slot: Slot, stage: Stage) -> None:
        slot.stage, slot.since = stage, time.monotonic()

    def _take(self, slot: Slot, message: Message) -> None:
        assert slot.worker
        name, job = slot.worker.name, slot.job
        match message:
            case Hello(facts=facts, place=place):
                slot.place = place
                if others := [*differences(self._facts, facts)]:
                    self._refuse(slot, f"it differs from this machine: {'; '.join(others)}")
                else:
                    self._set(slot, Stage.LOADING)
                    slot.worker.begin()
            case Ready():
                slot.failures = 0
                self._set(slot, Stage.IDLE)
                self._note(Notice(worker=name, change="ready", place=slot.place))
            case Answered(score=score, seconds=seconds) if job:
                took, slot.job, self._losses = time.monotonic() - slot.since, None, 0
                self._pace.add(seconds, took, score.items)
                self._set(slot, Stage.IDLE)
                if isinstance(score, Responses):
                    self._outbox.put(Unjudged(name, job, score, seconds))
                else:
                    self._give(self._schedule.answered(name, job, score, seconds))
            case Unscorable(reason=reason, seconds=seconds) if job:
                slot.job, self._losses = None, 0
                self._set(slot, Stage.IDLE)
                self._give(self._schedule.unscorable(name, job, reason, seconds))
            case Refused(reason=reason) | Unscorable(reason=reason):
                self._refuse(slot, reason)
            case Lost(reason=reason):
                self._lose(slot, reason)
            case _:
                self._lose(slot, f"it sent {message!r}, which nothing had asked for")

    def _lose(self, slot: Slot, reason: str) -> None:
        """Give a lost worker's job to others, and start another worker, unless two starts in a row failed."""
        assert slot.worker
        worker, job, was_ready = slot.worker, slot.job, slot.is_ready
        worker.kill()
        slot.worker, slot.job = None, None
        self._losses += 1
        slot.failures += not was_ready
        request = job.id if job else None
        self._note(Notice(worker=worker.name, change="lost", place=slot.place, reason=reason, request=request))
        if job:
            self._give(self._schedule.lost(worker.name, job, reason))
        if slot.failures > 1:
            self._shut(slot, f"worker {worker.name} did not start twice: {reason}", MachineError)
        elif self._losses >= 2 * sum(not each.closed for each in self._slots) + 2:
            raise MachineError(
                f"{plural(self._losses, 'worker')} were lost in a row, the last one because: {reason}. The run has lost"
                " nothing; resume it when the machines are well",
                "engine",
            )

    def _refuse(self, slot: Slot, reason: str) -> None:
        assert slot.worker
        worker = slot.worker
        worker.kill()
        job, slot.worker, slot.job = slot.job, None, None
        self._note(Notice(worker=worker.name, change="refused", place=slot.place, reason=reason))
        if job:
            self._give(self._schedule.lost(worker.name, job, reason))
        place = f" ({slot.place})" if slot.place else ""
        self._shut(slot, f"worker {worker.name}{place} cannot be used: {reason}", UserError)

    def _shut(self, slot: Slot, reason: str, error: type[LlmevoError]) -> None:
        """Leave a slot without a worker. Raises an error when too few are left."""
        slot.closed = True
        self._refusal = reason
        if sum(not each.closed for each in self._slots) < self._host.least:
            raise error(reason)

    def _note(self, notice: Notice) -> None:
        self._outbox.put(notice)

    def _check_time(self) -> None:
        now, limits = time.monotonic(), self._limits
        ready = sum(slot.is_ready for slot in self._slots)
        for slot in self._slots:
            spent = now - slot.since
            if slot.worker is None or slot.stage is Stage.IDLE:
                continue
            if slot.stage is Stage.GREETING:
                # A worker for which there is no room yet waits; it is one too many only if the run cannot begin.
                late, shortage = spent > limits.greeting, self._host.shortage()
                if late and shortage and ready < self._host.least:
                    raise UserError(shortage)
                late = late and not shortage
            elif slot.stage is Stage.LOADING:
                late = spent > limits.loading
            else:
                late = spent > self._limit(slot.job)
            if late:
                doing = f"{slot.stage.value} for {spent:.0f} s without an answer"
                self._lose(slot, f"it hung ({doing})")

    def _limit(self, job: Job | None) -> float:
        """The seconds after which a job's worker counts as hung, from the speed so far."""
        if job is None or not self._pace.measured:
            return self._limits.unmeasured
        questions = self._scoring.parts(job.questions)[job.part]
        return max(self._limits.least, self._limits.slack * (self._pace.merge + questions * self._pace.question))


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
