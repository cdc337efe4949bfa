"""The events of a run: what `events.jsonl` holds, one a line. Other tools read these; fields are only ever added."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from llmevo.evaluation.judges.records import Judgement, Presentation, Statement, Vote
from llmevo.evaluation.score import Score
from llmevo.merging.recipe import Recipe
from llmevo.search.trial import Candidate, Suggestion, Trial

SCHEMA = 1
"""Raised when a reader of the old schema would misread the new one."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class BaseEvent(BaseModel):
    """What every event has."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    time: str = Field(default_factory=_now)
    schema_: int = Field(default=SCHEMA, alias="schema", serialization_alias="schema")


class RunStarted(BaseEvent):
    event: Literal["run_started"] = "run_started"
    config: dict[str, Any]
    """With the overrides of the command line."""
    root: str
    """The folder relative references start from; relative itself, to the run's folder, in a run that was shared."""
    prompts: dict[str, str]
    """The templates used, as they were."""
    versions: dict[str, str]
    sources: list[dict[str, Any]]
    """Each model's reference, revision, checksum and licence."""
    seed: int
    evaluation_seed: int | None = None
    """Of random masks, shuffled questions and solved examples, where it is not `seed`."""
    genes: list[dict[str, Any]]
    """Each gene's name, low and high; with choices their names, whose places are its values."""
    layers: int
    items: int
    """Questions a candidate answers."""
    heldout_items: int
    """Questions a model answers in the end."""
    selection_items: int = 0
    """Further questions that finalists answer, to choose among them; 0 when there is no such step."""
    rules: int = 0
    """0, older logs: the uniform merge comes after the parents, start rows are asked everything, and who was stopped is
    no finalist. 1: it comes first, the other start rows are raced against it, and what the optimizer recommends is a
    finalist though it was stopped. 2: merges with other weights for all models are start rows (origin `coefficient`),
    and the best of them is a finalist and held out; optimizers start from the best start row; what is recommended
    follows from the scores alone, by one rule for every optimizer (`search.optimizers.recommend`); only candidates that
    were asked everything lead, and a finalist that was stopped is asked the rest first."""
    proposer: str
    """Who was asked, `auto` resolved; empty for an optimizer without an LLM."""
    style: str
    """The prompting style that suits it: prompts can be made again from this without the proposer."""
    questions: dict[str, str] = Field(default_factory=dict[str, str])
    """Digests of what `search` and `heldout` ask, how, and by which engine; empty in older logs."""
    texts: dict[str, dict[str, list[tuple[str, str]]]] = Field(
        default_factory=dict[str, dict[str, list[tuple[str, str]]]]
    )
    """Of `search` and `heldout`: {task: (question, right answer) of each}, shortened; empty in older logs."""
    start_from: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])
    """The user's own start rows: name and genes of each."""
    geometry: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])
    """Slice by slice the norms of and cosines between task vectors, as the LLM is told; empty where none is."""

    @property
    def masks(self) -> int:
        """The seed that random masks follow from."""
        return self.seed if self.evaluation_seed is None else self.evaluation_seed


class Prompted(BaseEvent):
    event: Literal["prompted"] = "prompted"
    generation: int
    model: str
    style: str
    messages: list[dict[str, str]]
    reply: str | None
    """None when there was no answer."""
    tokens: dict[str, int]
    cost: float
    seconds: float
    problems: list[str]
    analysis: str
    """The reason the model gave."""
    used: int
    """Proposals that could be read of it."""
    calls: int = 1
    """0 when it was not asked at all, for a cap was reached."""
    repair: bool = False
    """Whether this asks again for an answer that could not be read."""


class Judged(BaseEvent, Judgement):
    """What an LLM judge has just said. Like `presented` and `voted`, it stands before the score that it is for."""

    event: Literal["judged"] = "judged"
    generation: int


class Presented(BaseEvent, Presentation):
    """A candidate's replies are put to a person's vote."""

    event: Literal["presented"] = "presented"


class Voted(BaseEvent, Vote):
    """What the person has just said."""

    event: Literal["voted"] = "voted"


class Asked(BaseEvent):
    event: Literal["asked"] = "asked"
    generation: int
    candidates: list[dict[str, Any]]
    """id, origin, genes, recipe, note of each."""

    def read(self) -> list[Candidate]:
        return [Candidate(c["id"], self.generation, c["origin"], c["genes"], c["note"]) for c in self.candidates]


class Scored(BaseEvent):
    """What events that carry a score have in common."""

    score: float
    stderr: float
    tasks: dict[str, dict[str, float]]
    items: int
    item_scores: dict[str, list[int | float]] = Field(default_factory=dict[str, list[int | float]])
    """The counted metric of every question, task by task, in the order of `RunStarted.texts`; empty in older logs."""
    item_probabilities: dict[str, list[int | float]] = Field(default_factory=dict[str, list[int | float]])
    """How probable the right choice of every question was: of logs of version 0.1 with `racing.proxy`."""
    seconds: dict[str, float]
    cached: bool = False
    """Taken over from an equal candidate, of this run or of another of the same comparison."""

    def read(self) -> Score:
        return Score(self.score, self.stderr, self.tasks, self.items, self.item_scores)


class Evaluated(Scored):
    event: Literal["evaluated"] = "evaluated"
    candidate: int
    rival: int | None = None
    """The candidate that this one could not get ahead of any more, when it was stopped. Its score is then the rival's
    and the difference on the `items` that it was asked; `tasks` are of these alone."""
    proxy: bool = False
    """Whether it was stopped by those probabilities."""


class Selected(Scored):
    """A finalist scored on the selection items, which no candidate was asked before."""

    event: Literal["selected"] = "selected"
    candidate: int
    generation: int
    """After how many generations."""
    finalists: int
    """How many there are at that time."""


class Failed(BaseEvent):
    event: Literal["failed"] = "failed"
    candidate: int
    reason: str
    seconds: dict[str, float]


class Told(BaseEvent):
    event: Literal["told"] = "told"
    generation: int
    state: str
    sigma: float | None
    best: int | None
    """The best candidate so far."""
    trust: float | None = None
    """What the optimizer thinks of the LLM, 0 to 1; None where it has no such thing."""
    violations: dict[int, float] = Field(default_factory=dict[int, float])
    """By how much candidates of this generation miss the constraints; those that keep them all are not listed."""


class HeldOut(Scored):
    """A model scored on the held-out items."""

    event: Literal["heldout"] = "heldout"
    row: str
    """`base`, `uniform`, `coefficient 0.5` (the best of these), `best`, or a parent's name."""
    kind: str
    """`base`, `parent`, `uniform`, `coefficient` or `best`."""
    candidate: int | None
    replies: dict[str, list[str]] = Field(default_factory=dict[str, list[str]])
    """What the model answered to every question; empty in older logs."""

    def read(self) -> Score:
        return Score(self.score, self.stderr, self.tasks, self.items, self.item_scores, self.replies)


class RunFinished(BaseEvent):
    event: Literal["run_finished"] = "run_finished"
    best: int | None
    search_score: float | None
    heldout: dict[str, Any] | None
    """score, stderr and rows; None when the config names no held-out tasks."""
    violated: str = ""
    """Which constraints the best violates, where no candidate keeps them all."""
    front: list[int] = Field(default_factory=list[int])
    """The candidates of the Pareto front, where every task is an aim of its own."""
    proposals: dict[str, int]
    """`prompts` in all, of which `answered`, `lost` (no answer), `unreadable` (answered without a usable proposal),
    `capped` (not asked: a cap was reached) and `repairs` (asked once more); `used`: what became candidates of them."""


class Change(BaseModel):
    """Something that is not as it was when the run began."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    key: str
    """Its place in `run_started`: `config.llm.model`, `questions.search`, `sources.MODEL.checksum`."""
    before: Any
    now: Any


class Resumed(BaseEvent):
    """From here on something is different; a run that goes on as it was writes none."""

    event: Literal["resumed"] = "resumed"
    reason: str
    """In words: what was given with `--budget` or allowed with `--force`."""
    budget: int | dict[str, float] | None = None
    """The new `search.budget`, in the form of the config; None where it stays."""
    forced: list[Change] = Field(default_factory=list[Change])
    """What had changed and was allowed with `--force`."""
    versions: dict[str, str] = Field(default_factory=dict[str, str])
    """As in `run_started`: what the run goes on with."""


Event = Annotated[
    RunStarted
    | Resumed
    | Prompted
    | Judged
    | Presented
    | Voted
    | Asked
    | Evaluated
    | Failed
    | Selected
    | Told
    | HeldOut
    | RunFinished,
    Field(discriminator="event"),
]
"""Any event."""


EVENTS: TypeAdapter[Event] = TypeAdapter(Event)


def said(statement: Statement, generation: int) -> Judged | Presented | Voted:
    """The event of what a judge or a voter says."""
    fields = statement.model_dump()
    match statement:
        case Judgement():
            return Judged(generation=generation, **fields)
        case Presentation():
            return Presented(**fields)
        case Vote():
            return Voted(**fields)
        case _:
            raise TypeError(f"{statement} is no event")


def asked(generation: int, first: int, suggestions: Sequence[Suggestion], recipes: Sequence[Recipe]) -> Asked:
    """The event of a generation's candidates, numbered from `first`."""
    pairs = zip(suggestions, recipes, strict=True)
    return Asked(
        generation=generation,
        candidates=[
            {"id": first + i, "origin": s.origin, "genes": s.genes, "recipe": recipe.as_dict(), "note": s.note}
            for i, (s, recipe) in enumerate(pairs)
        ],
    )


def scored(score: Score, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The fields of `Scored`."""
    return {
        "score": score.total,
        "stderr": score.stderr,
        "tasks": {task: dict(metrics) for task, metrics in score.tasks.items()},
        "items": score.items,
        "item_scores": {task: [*map(_short, values)] for task, values in score.item_scores.items()},
        "seconds": rounded(seconds),
        "cached": not seconds,
    }


def _short(value: float) -> float:
    """0 and 1 in one character; as many digits of others as tell questions apart."""
    return int(value) if value == int(value) else round(value, 4)


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """To milliseconds."""
    return {name: round(value, 3) for name, value in seconds.items()}


def of_trial(trial: Trial, rival: int | None = None) -> Evaluated | Failed:
    """The event of a trial; with the rival that it was stopped by."""
    if trial.score is None:
        return Failed(candidate=trial.candidate.id, reason=trial.reason, seconds=rounded(trial.seconds))
    return Evaluated(candidate=trial.candidate.id, rival=rival, **scored(trial.score, trial.seconds))
