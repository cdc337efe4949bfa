"""The workers of a run, as far as its log says: what each did, and how much of the time all were at work."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from llmevo.run.log import events


@dataclass
class WorkerRecord:
    """One worker; one that takes the place of a lost one counts as the same."""

    name: str
    """Its number."""
    state: Literal["ready", "lost", "refused", "waiting", "ended"] = "ended"
    """`lost`: another is being started. `waiting`: there is no room for it. `ended`: of an earlier session."""
    place: str = ""
    """The machine, the process and the device."""
    last: str = ""
    """What it scored last: `candidate 7`, `finalist 7` or `held-out row best`."""
    questions: int = 0
    """That it answered, as far as they belong to complete scores."""
    seconds: float = 0.0
    """Of merging and scoring."""
    losses: int = 0
    reason: str = ""
    """Why it was lost or refused last."""

    @property
    def rate(self) -> float:
        """Questions a second of its own time."""
        return self.questions / self.seconds if self.seconds else 0.0


@dataclass
class Work:
    """The time of one part of a run, in seconds."""

    busy: float = 0.0
    """Of merging and scoring, of all workers together."""
    wall: float = 0.0
    """Between events; pauses and the loading of engines do not count."""
    capacity: float = 0.0
    """The same, times the number of workers that were ready."""


@dataclass
class WorkerHistory:
    """The workers of a run. Only `take` changes it."""

    members: dict[str, WorkerRecord] = field(default_factory=dict[str, WorkerRecord])
    """By their numbers, in the order of their first mention; empty for a run without workers."""
    questions: int = 0
    start: Work = field(default_factory=Work)
    """Of the start rows."""
    search: Work = field(default_factory=Work)
    """Of later candidates."""
    finals: Work = field(default_factory=Work)
    """Of finalists and held-out rows."""
    generation: float = 0.0
    """The wall time since candidates were asked for last."""
    _before: datetime | None = None
    """When the step in progress began."""
    _earlier: int = 0
    """How many workers were ready at the end of the session before, until one of this session has scored."""

    @property
    def present(self) -> list[WorkerRecord]:
        """The workers of the last session."""
        return [member for member in self.members.values() if member.state != "ended"]

    @property
    def ready(self) -> int:
        """How many workers score now."""
        return sum(member.state == "ready" for member in self.members.values())

    @property
    def expected(self) -> int:
        """The same; at the beginning of a session as many as in the one before, whose engines are being loaded."""
        return max(self.ready, self._earlier)

    @property
    def rate(self) -> float:
        """Questions a second of all workers together."""
        wall = self.start.wall + self.search.wall + self.finals.wall
        return self.questions / wall if wall else 0.0

    def take(self, event: events.Event, generation: int = 0, steady: bool = False) -> None:
        """Take the next event; `generation` is that of its candidate, `steady` whether the LLM is asked meanwhile."""
        if isinstance(event, events.Worker):
            self._change(event)
            return
        now = datetime.fromisoformat(event.time)
        gap = (now - (self._before or now)).total_seconds()
        self._before = now
        match event:
            case events.Asked():
                self.generation = 0.0
            case events.Evaluated() | events.Failed():
                work = self.search if generation else self.start
                self.generation += self._add(work, gap, event.seconds, event.workers, f"candidate {event.candidate}")
            case events.Selected() | events.Served():
                self._add(self.finals, gap, event.seconds, event.workers, f"finalist {event.candidate}")
            case events.HeldOut():
                self._add(self.finals, gap, event.seconds, event.workers, f"held-out row {event.row}")
            case events.Unscored():
                self._add(self.finals, gap, event.seconds, event.workers, event.name)
            case events.Prompted() if steady and self.members:
                self._pass(self.search, min(gap, event.seconds))
            case _:
                pass

    def _change(self, event: events.Worker) -> None:
        member = self._member(event.worker)
        if event.change == "ready":
            if member.state == "ready":  # without a loss: a session has ended, and another has begun
                self._earlier = self.ready
                for each in self.members.values():
                    each.state = "ended"
            if not self.ready:
                self._before = datetime.fromisoformat(event.time)  # what was before was loading
        else:
            member.losses += event.change == "lost"
            member.reason = event.reason
        member.state, member.place = event.change, event.place or member.place

    def _member(self, worker: str) -> WorkerRecord:
        """The member that a worker is; `2.3` is the third in the place of 2."""
        number = worker.partition(".")[0]
        return self.members.setdefault(number, WorkerRecord(number))

    def _add(
        self, work: Work, gap: float, seconds: Mapping[str, float], workers: Mapping[str, int], what: str
    ) -> float:
        """Add a score, or a failure, of these workers, and return its wall time."""
        if not workers:
            return 0.0
        self._earlier = 0
        took, questions = sum(seconds.values()), sum(workers.values())
        for worker, answered in workers.items():
            member = self._member(worker)
            member.questions += answered
            member.seconds += took * (answered / questions if questions else 1 / len(workers))
            member.last = what
        self.questions += questions
        work.busy += took
        return self._pass(work, min(gap, took))

    def _pass(self, work: Work, wall: float) -> float:
        work.wall += wall
        work.capacity += wall * max(1, self.ready)
        return wall
