"""The order of work: which part of which request a free worker takes next. Pure: it knows no process and no clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmevo.evaluation.score import Score
from llmevo.workers.protocol import Job, Request, Result, Scoring

MOST_LOSSES = 2
"""Workers that a request may cost before it is given up: a recipe that kills engines must not end them all."""


@dataclass
class OpenRequest:
    """A request that is being scored."""

    request: Request
    raced: bool
    parts: Sequence[int]
    begun: Score | None
    """The score of its first parts, known from before."""
    first: int
    """The first part that is to be asked."""
    answers: dict[int, Score] = field(default_factory=dict[int, Score])
    failed: dict[int, str] = field(default_factory=dict[int, str])
    """{part: why the candidate cannot be merged or scored}."""
    asked: dict[int, int] = field(default_factory=dict[int, int])
    """{part that a worker answers now: `counted` when it was handed out}."""
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    workers: dict[str, int] = field(default_factory=dict[str, int])
    lost: list[str] = field(default_factory=list[str])
    """Why workers were lost."""
    lost_at: set[str] = field(default_factory=set[str])
    """The places of these workers: see `_place`."""
    counted: int = 0
    """The losses, those at the same time as one."""
    looked: int = 0
    """The number of parts after which it was decided whether it goes on, those known from before included."""
    twins: list[Request] = field(default_factory=list[Request])
    """Requests of the same recipe, which wait for this one's score."""

    @property
    def next_part(self) -> int | None:
        """The next part that a worker may take; of a raced request, only once the one before is answered."""
        return None if self.raced and self.asked else self.later_part

    @property
    def later_part(self) -> int | None:
        """The next part that no worker has, also where the one before is not answered."""
        if self.counted >= MOST_LOSSES:
            return None
        end = min(self.failed, default=len(self.parts))  # no answer behind a failure counts
        left = (part for part in range(self.first, end) if part not in self.answers)
        return next((part for part in left if part not in self.asked), None)

    @property
    def answered(self) -> int:
        """The number of parts that are answered without a gap, those known from before included."""
        return next(part for part in range(self.first, len(self.parts) + 1) if part not in self.answers)

    @property
    def is_begun(self) -> bool:
        return bool(self.asked or self.answers)

    def took(self, worker: str, questions: int, seconds: Mapping[str, float]) -> None:
        """Count what a worker did for it."""
        self.workers[worker] = self.workers.get(worker, 0) + questions
        for kind, spent in seconds.items():
            self.seconds[kind] = self.seconds.get(kind, 0.0) + spent

    def result(self, score: Score | None, reason: str = "") -> Result:
        return Result(self.request.id, score, reason, self.seconds, self.workers, len(self.lost))


class Schedule:
    """The open requests, and what workers do for them.

    The unit of work is a part of the questions. A raced request is asked one part after the other and stopped as soon
    as it is beaten, so no worker waits for the longest candidate; a request without rivals may be spread over several
    workers. What a request scores does not depend on the workers or on the order of their answers.
    """

    def __init__(self, scoring: Scoring) -> None:
        self._scoring = scoring
        self._open: dict[int | str, OpenRequest] = {}
        self._holds: dict[str, int | str] = {}
        """{worker: the request whose weights it holds}."""
        self._further: list[Result] = []

    @property
    def waiting(self) -> int:
        """Requests that no worker has begun."""
        return sum(not each.is_begun for each in self._open.values())

    @property
    def awaits_answer(self) -> bool:
        """Whether a request has cost several workers and is given up with the next answer of any: see `further`."""
        return any(of.counted >= MOST_LOSSES for of in self._open.values())

    def add(self, request: Request) -> Result | None:
        """Open a request, or return its result if the score is known already."""
        known, parts = self._scoring.known(request), self._scoring.parts(request.questions)
        first = _parts_of(known, parts)
        if known and first == len(parts):
            return Result(request.id, known)
        if twin := next((of for of in self._open.values() if _is_twin(of.request, request)), None):
            twin.twins.append(request)
            return None
        raced = self._scoring.is_raced(request)
        if known and raced and (score := self._scoring.stopped(request, known)):
            return Result(request.id, score)
        self._open[request.id] = OpenRequest(request, raced, parts, known, first, looked=first)
        return None

    def job_for(self, worker: str, ahead: bool = False) -> Job | None:
        """Return the next job of a free worker: rather one of the recipe that it holds, else of a new recipe, else any,
        for which it has to merge a recipe that another worker holds too. Recipes that were lost at its place come last.

        With `ahead`, a worker that would be idle takes a part of a raced request of which others answer the parts
        before. Its answers are in vain if these stop the request, so this is for when no new request is to come. A part
        that was not needed must not be what a request is given up for: after a loss nothing is asked ahead.
        """
        held, place = self._open.get(self._holds.get(worker, "")), _place(worker)
        ready = [each for each in self._open.values() if each.next_part is not None]
        ready.sort(key=lambda each: (each is not held, place in each.lost_at, each.is_begun))
        if not ready and ahead:
            every = [each for each in self._open.values() if each.later_part is not None and not each.counted]
            ready = [each for each in every if not self._scoring.asks_judges(each.request.questions)]  # these are paid
            ready.sort(key=lambda each: (each is not held, place in each.lost_at, each.later_part))
        if not ready or (part := ready[0].later_part) is None:
            return None
        chosen = ready[0]
        chosen.asked[part] = chosen.counted
        self._holds[worker] = chosen.request.id
        return Job(chosen.request.id, chosen.request.recipe, chosen.request.questions, part, chosen.request.quantize)

    def is_open(self, job: Job) -> bool:
        """Return whether the answers to a job are still wanted."""
        return job.id in self._open

    def answered(self, worker: str, job: Job, score: Score, seconds: Mapping[str, float]) -> Result | None:
        """Take the answers to a job. Return the result of its request if that is complete or stopped."""
        if (of := self._taken(job)) is None:
            return None
        of.took(worker, of.parts[job.part], seconds)
        of.answers[job.part] = score
        return self._judged(of)

    def unscorable(self, worker: str, job: Job, reason: str, seconds: Mapping[str, float]) -> Result | None:
        """Take a failure of the candidate itself. The first part that fails gives the reason."""
        if (of := self._taken(job)) is None:
            return None
        of.took(worker, 0, seconds)
        of.failed[job.part] = reason
        return self._judged(of)

    def lost(self, worker: str, job: Job, reason: str) -> None:
        """Take a loss of a worker: the job is done elsewhere, unless its request has cost several workers already."""
        self._holds.pop(worker, None)
        of = self._open.get(job.id)
        if of is None or (before := of.asked.pop(job.part, None)) is None:
            return
        of.lost.append(reason)
        of.lost_at.add(_place(worker))
        of.counted += before == of.counted

    def further(self) -> list[Result]:
        """Return the results that follow from an answer to another request: of equal recipes, and of requests that have
        cost several workers. The latter are given up once a worker has answered something since: as long as none can,
        the machine may be at fault.
        """
        for of in [of for of in self._open.values() if of.counted >= MOST_LOSSES]:
            reasons = "; ".join(dict.fromkeys(of.lost))
            self._further.append(self._close(of, of.result(None, f"lost twice on different workers: {reasons}")))
        found, self._further = self._further, []
        return found

    def _judged(self, of: OpenRequest) -> Result | None:
        """Return the result of a request that is complete, stopped or failed. Parts that were answered ahead are judged
        one after the other, as if they had been asked so.
        """
        while of.looked < of.answered:
            of.looked += 1
            complete = of.looked == len(of.parts)
            if not (complete or of.raced):
                continue
            done = [of.answers[part] for part in range(of.first, of.looked)]
            joined = self._scoring.join(of.request.questions, [of.begun, *done] if of.begun else done)
            stopped = None if complete else self._scoring.stopped(of.request, joined)
            if complete or stopped:
                self._scoring.keep(of.request, stopped or joined)
                return self._close(of, of.result(stopped or joined))
        if of.looked in of.failed:
            return self._close(of, of.result(None, of.failed[of.looked]))
        return None

    def _taken(self, job: Job) -> OpenRequest | None:
        """The request of a job that a worker has given back; None where another part has closed it."""
        of = self._open.get(job.id)
        return of if of and of.asked.pop(job.part, None) is not None else None

    def _close(self, of: OpenRequest, result: Result) -> Result:
        del self._open[of.request.id]
        self._further += filter(None, [*map(self.add, of.twins)])
        return result


def _is_twin(one: Request, other: Request) -> bool:
    return (one.questions, one.quantize, one.recipe) == (other.questions, other.quantize, other.recipe)


def _place(worker: str) -> str:
    """Where a worker runs: `2` of `2.3`, the third one that was started there."""
    return worker.partition(".")[0]


def _parts_of(score: Score | None, parts: Sequence[int]) -> int:
    """The number of parts that a score is of."""
    answered, count = 0, 0
    while score and count < len(parts) and answered < score.items:
        answered, count = answered + parts[count], count + 1
    return count
