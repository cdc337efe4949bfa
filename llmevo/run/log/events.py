"""The events of a run, one a line of `events.jsonl`. Other tools read them: fields are added, never taken away."""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from llmevo.evaluation.judges.verdicts import Judgement, Presentation, Statement, Vote
from llmevo.evaluation.score import Score, logged
from llmevo.merging.recipe import Recipe
from llmevo.search.trial import Candidate, Suggestion
from llmevo.workers.protocol import Notice, Result

REPLY = 80
"""Characters of each reply to a search question that the log holds."""

SCHEMA = 1
"""Raised when a reader of the old schema would misread the new one."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class BaseEvent(BaseModel):
    """The fields of every event."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    time: str = Field(default_factory=_now)
    schema_: int = Field(default=SCHEMA, alias="schema", serialization_alias="schema")


class RunStarted(BaseEvent):
    """The beginning: the config, the models, the questions and the genes. Always the first line."""

    event: Literal["run_started"] = "run_started"
    config: dict[str, Any]
    """With the overrides of the command line."""
    root: str
    """The folder that relative references start from; in a shared run relative to the run's folder."""
    prompts: dict[str, str]
    """The texts of the prompt templates."""
    versions: dict[str, str]
    sources: list[dict[str, Any]]
    """Each model's reference, revision, checksum of the weights, digest of the config, and licence."""
    seed: int
    evaluation_seed: int | None = None
    """The seed of random masks, shuffled questions and solved examples; `seed` where it is None."""
    genes: list[dict[str, Any]]
    """Name, low and high of each gene; of a categorical gene also its choices, whose places are the values."""
    layers: int
    routers: list[str] = Field(default_factory=list[str])
    """Filters for the routers of a mixture of experts, which candidates have from the base; empty in older logs, where
    they were merged like other tensors."""
    items: int
    """Search questions of a candidate."""
    heldout_items: int
    """Held-out questions."""
    selection_items: int = 0
    """Selection questions, on which finalists are compared; 0 without that step."""
    rules: int = 0
    """The version of the run's procedure. 0 (older logs): the uniform merge comes after the parents, start rows are not
    raced, and a stopped candidate is no finalist. 1: the uniform merge comes first, the other start rows are raced
    against it, and the optimizer's recommendation is a finalist even if it was stopped. 2: merges with one weight for
    all models are start rows (origin `coefficient`), and the best of them is a finalist and held out; optimizers start
    from the best start row; one rule recommends for every optimizer (`search.optimizers.recommendation`); only fully
    evaluated candidates lead, and a stopped finalist is asked the remaining questions first. 3: `llm` and `llm-off` are
    Bayesian optimization instead of CMA-ES with a surrogate; the LLM is asked before anything is scored, and its
    recipes are start rows; another process recommends. 4: finalists are compared by each task's mean over all its
    questions instead of the mean of the scores on both sets; what finalists are asked does not count in the budget;
    very low scores are raised for the Gaussian process; the LLM's tables are read by their names, and all of an answer
    as decimals or as hundredths. 5: a parent with the name of another held-out row, such as `best`, is `best (parent)`
    there; where no path is left, `spaces: both` goes on with its next part and `paths-ga` with random edits; numbers of
    a path are the gains of repeated or scaled segments alone; where minutes or cost bound the search, optimizers plan
    with a forecast of the evaluations."""
    proposer: str
    """The LLM client, `auto` resolved; empty for an optimizer without an LLM."""
    order: Literal["", "strict", "steady"] = ""
    """The order of asking and scoring. Empty: one candidate after the other, each raced against all before it.
    `strict`: the candidates of a generation are scored at the same time, raced against those that were complete when it
    began, and told when all are scored. `steady`: after the start rows, a candidate is asked for whenever a worker is
    free, and each is told when it is scored. `evaluated` events stand in the order in which the scores arrived."""
    workers: int = 1
    """How many candidates are scored at the same time; the optimizer asks for as many."""
    style: str
    """The client's prompting style: prompts can be recomputed from it without the client."""
    questions: dict[str, str] = Field(default_factory=dict[str, str])
    """Digests of the `search`, `selection` and `heldout` questions, of how they are asked, and of the engine; of
    `prepare.text` where the config has one."""
    texts: dict[str, dict[str, list[tuple[str, str]]]] = Field(
        default_factory=dict[str, dict[str, list[tuple[str, str]]]]
    )
    """{task: (question, right answer) of each}, shortened, of each set of questions; empty in older logs."""
    clusters: dict[str, dict[str, list[int]]] = Field(default_factory=dict[str, dict[str, list[int]]])
    """{task: a number for each question}, of each set: equal numbers are the same question. In older logs, which lack
    it, questions with the same text are."""
    groups: dict[str, dict[str, dict[str, float]]] = Field(default_factory=dict[str, dict[str, dict[str, float]]])
    """{group: {task: its share in the group's metric}}, of each set of questions."""
    vocabulary: str = ""
    """A digest of the tokens of all candidates, where the models' tokens differ and embeddings are merged by token;
    else empty."""
    start_from: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])
    """The user's own start rows: name and genes of each, and the path of layer paths."""
    geometry: list[dict[str, Any]] = Field(default_factory=list[dict[str, Any]])
    """Norms of and cosines between task vectors of each slice, for the LLM's prompt; empty without an LLM."""
    cards: dict[str, str] = Field(default_factory=dict[str, str])
    """{short name of a model: an excerpt of its model card}, for the LLM's prompt. Like the next two, empty without an
    LLM and where names are masked."""
    descriptions: dict[str, str] = Field(default_factory=dict[str, str])
    """{search task: its own description}, of those that have one."""
    chances: dict[str, float] = Field(default_factory=dict[str, float])
    """{search task: the metric of a model that guesses}, of tasks with choices."""
    scan: dict[str, tuple[float, float]] = Field(default_factory=dict[str, tuple[float, float]])
    """{path of a single edit: its effect and standard error} from `genome.path.scan`."""
    layer_parameters: list[int] = Field(default_factory=list[int])
    """The number of parameters of each layer of the first model; like the next one, only where a constraint or an
    objective is of sizes."""
    other_parameters: int = 0
    """Those of its other tensors."""
    active_parameters: list[int] = Field(default_factory=list[int])
    """Of the parameters of each layer those that a token is multiplied by."""
    head_parameters: int = 0
    """Those of the output head."""

    @property
    def masks(self) -> int:
        """The seed of random masks."""
        return self.seed if self.evaluation_seed is None else self.evaluation_seed


class Prompted(BaseEvent):
    """A prompt to the LLM, with its reply."""

    event: Literal["prompted"] = "prompted"
    generation: int
    model: str
    style: str
    messages: list[dict[str, str]]
    reply: str | None
    """None without an answer."""
    tokens: dict[str, int]
    cost: float
    seconds: float
    problems: list[str]
    analysis: str
    """The LLM's reasoning."""
    used: int
    """Readable proposals."""
    calls: int = 1
    """0 when the LLM was not asked because a cap was reached."""
    repair: bool = False
    """Whether this repeats the question after an unreadable answer."""


class Judged(BaseEvent, Judgement):
    """Verdicts of an LLM judge. Like `presented` and `voted`, it stands before the score that it belongs to."""

    event: Literal["judged"] = "judged"
    generation: int


class Presented(BaseEvent, Presentation):
    """A candidate's replies, presented for a person's vote."""

    event: Literal["presented"] = "presented"


class Voted(BaseEvent, Vote):
    """A person's vote."""

    event: Literal["voted"] = "voted"


class Worker(BaseEvent, Notice):
    """A change among the workers. It stands before the event that was awaited, and decides nothing."""

    event: Literal["worker"] = "worker"


class Asked(BaseEvent):
    """The candidates that an optimizer suggests."""

    event: Literal["asked"] = "asked"
    generation: int
    candidates: list[dict[str, Any]]
    """id, origin, genes, recipe, note and expected (the score that its proposer predicts, or null) of each; and path,
    the text form of a layer path, of candidates that are one."""

    def read(self) -> list[Candidate]:
        return [
            Candidate(c["id"], self.generation, c["origin"], c["genes"], c["note"], _expected(c), c.get("path", ""))
            for c in self.candidates
        ]


EXPECTED = re.compile(r"expected (-?\d[\d.e+-]*)")


def _expected(candidate: Mapping[str, Any]) -> float | None:
    """Return the predicted score of a logged candidate; older logs have the surrogate's in the note alone."""
    if "expected" not in candidate and candidate["origin"] == "gaussian":
        found = EXPECTED.fullmatch(candidate["note"])
        return float(found[1]) if found else None
    return candidate.get("expected")


class Scored(BaseEvent):
    """The fields of events with a score."""

    score: float
    stderr: float
    tasks: dict[str, dict[str, float]]
    items: int
    item_scores: dict[str, list[int | float]] = Field(default_factory=dict[str, list[int | float]])
    """{task: the counted metric of each question}, in the order of `RunStarted.texts`; empty in older logs."""
    item_probabilities: dict[str, list[int | float]] = Field(default_factory=dict[str, list[int | float]])
    """Probabilities of right choices, in logs of version 0.1 with `racing.proxy`."""
    seconds: dict[str, float]
    cached: bool = False
    """Whether the score was taken over from an equal candidate of this run or of the same comparison."""
    workers: dict[str, int] = Field(default_factory=dict[str, int])
    """{worker: questions that it answered}; empty where the run scores in its own process."""
    losses: int = 0
    """How many workers were lost while they scored this."""
    quantized: str = ""
    """The format that the weights were rounded to (`engine.quantize`); empty where they had the merge's type."""

    def read(self) -> Score:
        return Score(self.score, self.stderr, self.tasks, self.items, self.item_scores)


class Evaluated(Scored):
    """A candidate's score on the search questions."""

    event: Literal["evaluated"] = "evaluated"
    candidate: int
    rival: int | None = None
    """The candidate that racing stopped this one against; None for a full evaluation. The score is then the rival's
    plus the difference on the `items` that both were asked; `tasks` are of these alone."""
    proxy: bool = False
    """Whether `racing.proxy` stopped it, in logs of version 0.1."""
    replies: dict[str, list[str]] = Field(default_factory=dict[str, list[str]])
    """{task: the reply to each question}, shortened to `REPLY` characters, for the LLM's prompt; empty without an LLM
    and where names are masked."""

    def read(self) -> Score:
        return Score(self.score, self.stderr, self.tasks, self.items, self.item_scores, self.replies)


class Selected(Scored):
    """A finalist's score on the selection questions."""

    event: Literal["selected"] = "selected"
    candidate: int
    generation: int
    """The number of generations before."""
    finalists: int
    """The number of finalists at that time."""


class Served(Scored):
    """A finalist's score in the format in which it will be served, on questions that it answered before in the merge's
    type. Once there are those of all finalists, they choose the best."""

    event: Literal["served"] = "served"
    candidate: int
    questions: Literal["search", "selection"]
    generation: int
    """The number of generations before."""
    finalists: int
    """The number of finalists at that time."""


class Failed(BaseEvent):
    """A candidate that could not be merged or scored, or did not pass the gate."""

    event: Literal["failed"] = "failed"
    candidate: int
    reason: str
    seconds: dict[str, float]
    workers: dict[str, int] = Field(default_factory=dict[str, int])
    """See `Scored`."""
    losses: int = 0


class Told(BaseEvent):
    """The optimizer was told scores; its state follows from all lines before."""

    event: Literal["told"] = "told"
    generation: int
    """With `search.order: steady` the number of this event: each trial is told alone."""
    state: str
    sigma: float | None
    best: int | None
    """The best candidate so far."""
    trust: float | None = None
    """The share of the candidates that the optimizer gives the LLM, 0 to 1; None without an LLM."""
    candidates: list[int] = Field(default_factory=list[int])
    """The candidates whose trials the optimizer was told of; empty in older logs."""
    violations: dict[int, float] = Field(default_factory=dict[int, float])
    """{candidate: by how much it violates the constraints}, of those that do."""


class HeldOut(Scored):
    """A model's score on the held-out questions."""

    event: Literal["heldout"] = "heldout"
    row: str
    """`base`, `uniform`, `coefficient 0.5` (the best of these), `best`, or a parent's name, with ` (parent)` where
    another row has that name; with `engine.quantize` also the best in the other form, such as `best (q4_0)`."""
    kind: str
    """`base`, `parent`, `uniform`, `coefficient` or `best`; `served` for the best rounded to the format of
    `engine.quantize`, or `plain` for the best as it is, where all other rows are rounded."""
    candidate: int | None
    replies: dict[str, list[str]] = Field(default_factory=dict[str, list[str]])
    """{task: the answer to each question}; empty in older logs."""

    def read(self) -> Score:
        return Score(self.score, self.stderr, self.tasks, self.items, self.item_scores, self.replies)


OF_BEST = ("best", "served", "plain")
"""The kinds of held-out rows that are of the best."""

PARENT = " (parent)"
"""The end of a parent's row where the parent has the name of another row, such as `best`."""


class Unscored(BaseEvent):
    """A finalist or a held-out row that could not be scored: it stands in the place of the event `step`."""

    event: Literal["unscored"] = "unscored"
    step: Literal["selected", "served", "heldout"]
    candidate: int | None
    """None for the held-out row of the base."""
    reason: str
    row: str = ""
    """Like `kind`, of a held-out row: see `HeldOut`."""
    kind: str = ""
    questions: str = ""
    """Of a finalist in the format in which it will be served: `search` or `selection`."""
    generation: int = 0
    """Like `finalists`, of a finalist: see `Selected`."""
    finalists: int = 0
    seconds: dict[str, float] = Field(default_factory=dict[str, float])
    workers: dict[str, int] = Field(default_factory=dict[str, int])
    """See `Scored`."""
    losses: int = 0
    quantized: str = ""

    @property
    def name(self) -> str:
        """What failed, such as `finalist 7` or `held-out row best`."""
        if self.step == "heldout":
            return f"held-out row {self.row}"
        form = f" in {self.quantized}, {self.questions} questions" if self.step == "served" else ""
        return f"finalist {self.candidate}{form}"

    def __str__(self) -> str:
        return f"{self.name} failed: {self.reason}"


class RunFinished(BaseEvent):
    """The end: the best candidate and the held-out scores."""

    event: Literal["run_finished"] = "run_finished"
    best: int | None
    search_score: float | None
    heldout: dict[str, Any] | None
    """score, stderr and rows, and where rows failed their names as `failed`; None when the config names no held-out
    tasks. Without a score of the row `best`, score and stderr are None.
    """
    violated: str = ""
    """The constraints that the best violates, where no candidate satisfies all."""
    front: list[int] = Field(default_factory=list[int])
    """The candidates of the Pareto front, where every task is an objective of its own."""
    proposals: dict[str, int]
    """Counts: `prompts`, of which `answered`, `lost` (no answer), `unreadable` (no proposal), `capped` (not asked
    because of a cap) and `repairs` (repeated); `used`: candidates that came of them."""


class Change(BaseModel):
    """A difference from the beginning of the run."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    key: str
    """Its place in `run_started`, such as `config.llm.model`, `questions.search`, `sources.MODEL.checksum`."""
    before: Any
    now: Any


class Resumed(BaseEvent):
    """A change with which the run goes on; a resume without changes writes no such event."""

    event: Literal["resumed"] = "resumed"
    reason: str
    """A text on `--budget` and `--force`."""
    budget: int | dict[str, float] | None = None
    """The new `search.budget` in the form of the config; None where it stays."""
    forced: list[Change] = Field(default_factory=list[Change])
    """Changes allowed with `--force`."""
    counts: dict[str, int] = Field(default_factory=dict[str, int])
    """{set of questions: how many it has now}, where questions or models have changed; empty in older logs. Scores of
    finalists and held-out rows before it then do not count."""
    texts: dict[str, dict[str, list[tuple[str, str]]]] = Field(
        default_factory=dict[str, dict[str, list[tuple[str, str]]]]
    )
    """The questions as they are now, with `counts`: see `RunStarted`."""
    clusters: dict[str, dict[str, list[int]]] = Field(default_factory=dict[str, dict[str, list[int]]])
    groups: dict[str, dict[str, dict[str, float]]] = Field(default_factory=dict[str, dict[str, dict[str, float]]])
    versions: dict[str, str] = Field(default_factory=dict[str, str])
    """Versions that differ from `run_started`."""


Event = Annotated[
    RunStarted
    | Resumed
    | Prompted
    | Judged
    | Presented
    | Voted
    | Worker
    | Asked
    | Evaluated
    | Failed
    | Selected
    | Served
    | Told
    | HeldOut
    | Unscored
    | RunFinished,
    Field(discriminator="event"),
]

EVENTS: TypeAdapter[Event] = TypeAdapter(Event)


def said(statement: Statement, generation: int) -> Judged | Presented | Voted:
    """Return the event of a verdict."""
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
            {
                "id": first + i,
                "origin": s.origin,
                "genes": s.genes,
                "recipe": recipe.as_dict(),
                "note": s.note,
                "expected": s.expected,
                **({"path": s.path} if s.path else {}),
            }
            for i, (s, recipe) in enumerate(pairs)
        ],
    )


def unscored(result: Result, step: Literal["selected", "served", "heldout"], **place: Any) -> Unscored:
    """Return the event of a finalist or a held-out row without a score."""
    rest: dict[str, Any] = {"workers": {**result.workers}, "losses": result.losses}
    return Unscored(step=step, reason=result.reason, seconds=rounded(result.seconds), **place, **rest)


def of_notice(notice: Notice) -> Worker:
    """Return the event of a change among the workers."""
    return Worker(**notice.model_dump())


def scored(result: Result, quantized: str = "") -> dict[str, Any]:
    """Return the fields of `Scored` of a result with a score; `quantized`: see there."""
    score, seconds = result.score, result.seconds
    assert score
    return {
        "score": score.total,
        "stderr": score.stderr,
        "tasks": {task: dict(metrics) for task, metrics in score.tasks.items()},
        "items": score.items,
        "item_scores": {task: [*map(_short, values)] for task, values in score.item_scores.items()},
        "seconds": rounded(seconds),
        "cached": not seconds,
        "workers": {**result.workers},
        "losses": result.losses,
        "quantized": quantized,
    }


def _short(value: float) -> float:
    """Round; 0 and 1 become integers, which are shorter in the log."""
    return int(value) if value == int(value) else logged(value)


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """Round to milliseconds."""
    return {name: round(value, 3) for name, value in seconds.items()}


def of_result(
    result: Result, candidate: int, rival: int | None = None, replies: bool = False, quantized: str = ""
) -> Evaluated | Failed:
    """Return the event of a candidate's result, with the `replies` if that is true; `rival` is the one that racing
    stopped it against, `quantized` the format that its weights were rounded to.
    """
    if result.score is None:
        rest: dict[str, Any] = {"workers": {**result.workers}, "losses": result.losses}
        return Failed(candidate=candidate, reason=result.reason, seconds=rounded(result.seconds), **rest)
    said = {task: [text[:REPLY] for text in texts] for task, texts in result.score.replies.items()} if replies else {}
    return Evaluated(candidate=candidate, rival=rival, replies=said, **scored(result, quantized))
