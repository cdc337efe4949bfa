"""The protocol between a run, its workers, and what they run on.

A run submits a `Request`, a recipe to be scored, and takes a `Result`. A worker answers one `Job` at a time: the
questions of one part, asked of one recipe. It holds a model whose weights it replaces; recipes travel, weights never.

The three implementations of `Workers` are `local` (in this process), and `pool` on two kinds of `Host`: `processes`
(one a GPU, or a share of the processor's cores) and `ray` (a cluster).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from llmevo.evaluation.responses import Responses
from llmevo.evaluation.score import Score
from llmevo.merging.recipe import Recipe


class Warn(Protocol):
    """Receives what the user is to be told."""

    def __call__(self, text: str, /) -> None: ...


# Between a run and its workers


@dataclass(frozen=True)
class Request:
    """A recipe to be scored."""

    id: int | str
    """The number of a candidate, or the name of a held-out row; unique among the requests that are open."""
    recipe: Recipe
    questions: str = "search"
    """`search`, `selection` or `heldout`."""
    rivals: Sequence[Score] = ()
    """The scores that it races against, the best first; none where it answers all questions."""
    run: str = ""
    """The run that asks, where several runs share the workers."""
    quantize: str = ""
    """The format that the weights are rounded to, one of `models.quantize`; empty for the merge's own type."""


@dataclass(frozen=True)
class Result:
    """What became of a request."""

    id: int | str
    score: Score | None
    """None for a candidate that cannot be merged or scored."""
    reason: str = ""
    """Why there is no score."""
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    """Of merging (`merge`) and of scoring (`evaluate`), all workers together; empty for a score that was known."""
    workers: Mapping[str, int] = field(default_factory=dict[str, int])
    """{worker: questions that it answered}; empty where scoring happens in this process."""
    losses: int = 0
    """How many workers were lost while they scored this."""


class Notice(BaseModel):
    """A change among the workers, for the log and the display."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    worker: str
    change: Literal["ready", "lost", "refused", "waiting"]
    """`ready`: it scores from now on. `lost`: its process, machine or engine died, or it hung, and it is started again.
    `refused`: it differs from this machine or cannot start, and it is left out. `waiting`: the cluster has no room for
    it, and there are too few others to go on."""
    place: str = ""
    """The machine, the process and the device."""
    reason: str = ""
    request: int | str | None = None
    """The request that it had in hand when it was lost; that one is scored elsewhere."""


@dataclass(frozen=True)
class Doing:
    """What a worker does now, for a display."""

    worker: str
    """Its number; of one that takes the place of a lost one the same."""
    stage: str
    """The value of a `pool.Stage`, or `left out`."""
    since: float
    """When that began, by `time.monotonic`."""
    request: int | str | None = None
    """What it scores: see `Request.id`."""


class Workers(Protocol):
    """Score requests, several at once where there are several workers."""

    observe: Callable[[Notice], None]
    """Receives every notice; called by `result`, in the thread of its caller."""

    @property
    def count(self) -> int:
        """How many requests can be scored at the same time."""
        ...

    @property
    def free(self) -> int:
        """How many more requests would be begun at once."""
        ...

    def submit(self, request: Request) -> None:
        """Queue a request."""
        ...

    def result(self) -> Result:
        """Wait for the next result, in the order in which they arrive.

        Raises MachineError when no worker can go on, and UserError for a mistake in the user's input that shows when
        the workers start.
        """
        ...

    def close(self) -> None:
        """End all workers. Requests that are open are forgotten."""
        ...


class Scoring(Protocol):
    """The part of the run in scoring: which questions a recipe is asked, and what the answers amount to."""

    @property
    def warn(self) -> Warn:
        """Tells the user what a worker warns of."""
        ...

    def known(self, request: Request) -> Score | None:
        """Return the score of earlier answers, of all parts or of the first ones; None where there are none."""
        ...

    def parts(self, questions: str) -> Sequence[int]:
        """Return the number of questions of each part, in the order in which a raced recipe answers them."""
        ...

    def is_raced(self, request: Request) -> bool:
        """Return whether the parts are asked one after the other, and the recipe may be stopped between them."""
        ...

    def join(self, questions: str, parts: Sequence[Score]) -> Score:
        """Return the score on several parts together, the first ones first."""
        ...

    def asks_judges(self, questions: str) -> bool:
        """Return whether judges are asked for a score on these questions."""
        ...

    def judged(self, job: "Job", responses: Responses, run: str) -> Score:
        """Return the score on a part with judged replies of a run. Called in the thread that takes results, for it asks
        judges and logs their verdicts. Raises CandidateError and JudgeError.
        """
        ...

    def stopped(self, request: Request, score: Score) -> Score | None:
        """Return the final score of a raced recipe that is to be stopped at this one; None where it goes on."""
        ...

    def keep(self, request: Request, score: Score) -> None:
        """Remember a score, so that no question is asked twice."""
        ...

    def control(self) -> "Job":
        """Return a job that every machine can answer if it can score candidates at all."""
        ...


# Between the pool and a worker


@dataclass(frozen=True)
class Job:
    """One part of the questions, to be asked of one recipe."""

    id: int | str
    recipe: Recipe
    questions: str
    part: int
    quantize: str = ""
    """See `Request`."""


@dataclass(frozen=True)
class Hello:
    """A worker has started and can see the models. Its engine is not loaded yet."""

    facts: Mapping[str, Any]
    """What decides scores: see `PartScorer.facts`."""
    place: str


@dataclass(frozen=True)
class Ready:
    """The worker's engine is loaded and checked."""

    warnings: Sequence[str] = ()
    """What the user is to be told."""


@dataclass(frozen=True)
class Answered:
    """The answers to a job."""

    score: Score | Responses
    """Responses where replies are judged, which a worker does not: see `Scoring.judged`."""
    seconds: Mapping[str, float]
    warnings: Sequence[str] = ()
    """See `Ready`."""


@dataclass(frozen=True)
class Unscorable:
    """The candidate cannot be merged or scored; another worker could not either."""

    reason: str
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    warnings: Sequence[str] = ()
    """See `Ready`."""


@dataclass(frozen=True)
class Refused:
    """A mistake in the user's input: the worker cannot start, and would not if it was started again."""

    reason: str


@dataclass(frozen=True)
class Lost:
    """The worker, its engine or its machine is lost. No candidate is at fault."""

    reason: str
    left: bool = False
    """The machine left, with all on it: that says nothing about the next start."""


Message = Hello | Ready | Answered | Unscorable | Refused | Lost


class PartScorer(Protocol):
    """What runs inside a worker: the engine and the tasks of a config."""

    warn: Warn
    """A worker sends it with its next message."""

    def facts(self) -> Mapping[str, Any]:
        """Return all that decides scores: versions, checksums of the models, digests of the questions, engine, dtype.
        Loads no engine.
        """
        ...

    def start(self) -> None:
        """Load the engine and check it."""
        ...

    def score_part(self, job: Job) -> tuple[Score | Responses, Mapping[str, float]]:
        """Return the score on one part of the questions, or the model's responses if replies are judged, and the
        seconds of merging and of scoring. Raises CandidateError and MachineError.
        """
        ...


ScorerFactory = Callable[[], PartScorer]
"""Makes the scorer in the worker's process. It is pickled: a function of a module, with its arguments."""


class Worker(Protocol):
    """A running worker, as the pool sees it. It has one message to give after each `begin`, `send`, and its launch."""

    name: str
    is_waiting: bool
    """There is no room for it yet, so that it has no process."""

    def begin(self) -> None:
        """Have it load the engine, after its `Hello`."""
        ...

    def send(self, job: Job) -> None:
        """Have it answer a job; returns at once."""
        ...

    def receive(self) -> Message:
        """Return its message, once `Host.wait` has named it; `Lost` when it died."""
        ...

    def kill(self) -> None:
        """End it at once, with all processes that it started."""
        ...


Kind = TypeVar("Kind", bound=Worker)


class Host(Protocol[Kind]):
    """Where workers run."""

    least: int
    """With fewer workers there is no run."""
    most: int
    """As many are started, as far as there is room for them."""
    one_at_a_time: bool
    """Whether a worker is started only when the one before is ready: engines on one GPU measure its free memory."""

    def launch(self, name: str) -> Kind:
        """Start a worker; returns at once."""
        ...

    def wait(self, workers: Sequence[Kind], seconds: float) -> Sequence[Kind]:
        """Wait until at least one of the workers has a message or has died, or `wake` is called, but not longer.

        An idle worker has no message to give.
        """
        ...

    def wake(self) -> None:
        """End a `wait`, from another thread."""
        ...

    def shortage(self) -> str:
        """Say why workers wait, such as how many GPUs the cluster has; empty if none does."""
        ...

    def close(self) -> None:
        """Free what belongs to the host itself; the workers are killed before."""
        ...
