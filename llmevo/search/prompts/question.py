"""A question to the LLM, independent of its wording, and the reading of the answer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast, overload

import numpy as np

from llmevo.llm.client import Request
from llmevo.search.space import Array, Genes, SearchSpace
from llmevo.search.trial import Suggestion, Trial

ROWS = 12  # trials shown at most


@dataclass(frozen=True)
class SliceGeometry:
    """The norms and cosines of a slice's task vectors, which no gene changes."""

    slice: str
    norms: Mapping[str, float]
    """‖task vector‖ / ‖base‖ of each model, by its short name."""
    cosines: Mapping[str, float]
    """Between the task vectors of each two models, by `first/second`."""

    @property
    def model_stock(self) -> float:
        """The share of the models' mean in Model Stock, the rest being the base: t = n·cos θ / (1 + (n - 1)·cos θ), for
        the mean angle θ between two of n task vectors (https://arxiv.org/abs/2403.19522, section 4).

        1 where all models are the same, 0 where their task vectors are orthogonal; also where the formula has a pole.
        """
        if not self.cosines:
            return 1.0
        many, cosine = len(self.norms), sum(self.cosines.values()) / len(self.cosines)
        below = 1.0 + (many - 1) * cosine
        return many * cosine / below if below > 1e-6 else 0.0


@dataclass(frozen=True)
class Belief:
    """A statement of the LLM about where good recipes lie, which becomes a prior mean with a learnt weight."""

    genes: tuple[str, ...]
    """The names of the genes that it is about."""
    direction: int = 0
    """1 if higher values than the best recipe's are better, -1 if lower ones are, 0 with a `value`, or if its values
    should stay."""
    value: float | None = None
    """The best value of these genes; None where the LLM names a direction alone."""
    spread: float | None = None
    """Half of the range in which the best value lies, in the genes' units; None where the LLM names no range."""
    confidence: float = 0.5
    """The LLM's own, from 0 to 1."""
    text: str = ""


@dataclass(frozen=True)
class Hypothesis:
    """A claim of the LLM that two recipes decide."""

    text: str
    task: str | None
    """The task whose score decides; None for the total."""
    better: Genes
    """The recipe that scores higher if the claim is true."""
    worse: Genes


@dataclass(frozen=True)
class Proposed:
    """An earlier proposal of the LLM and what became of it."""

    suggestion: Suggestion
    trial: Trial | None
    """None if it was not scored."""
    fate: str
    """`scored`, or the reason for which it was not."""
    generation: int


@dataclass(frozen=True)
class Question:
    """All that the LLM may know when it is asked for candidates."""

    space: SearchSpace
    trials: Sequence[Trial]
    """All trials so far."""
    tasks: Mapping[str, tuple[float, str]]
    """Each task's weight and the metric that counts."""
    wanted: int
    """The number of proposals."""
    generation: int
    sigma: float
    """The mutation step size around the proposals, as a share of a gene's range."""
    used: int
    """Evaluations spent."""
    budget: int
    suggestions: Sequence[tuple[Genes, float, float]] = ()
    """The surrogate's next candidates: genes, predicted score and its standard deviation, the best first."""
    predictions: Sequence[tuple[float, float]] = ()
    """The predicted and the actual score of the LLM's earlier proposals, the latest last."""
    geometry: Sequence[SliceGeometry] = ()
    """Empty where it was not measured."""
    mask_names: bool = False
    """Hide the names of models, tasks and parameters."""
    constraints: Sequence[str] = ()
    """Such as `arc >= parent - 0.01`; a trial that violates one has it as its reason."""
    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    """The current weight of each task where each is an objective of its own; empty where the score is their sum."""
    slots: int = 0
    """How many of the proposals are scored next; 0 where it is not known (older logs)."""
    proposed: Sequence[Proposed] = ()
    """The LLM's earlier proposals, the latest last."""
    hypotheses: Sequence[Hypothesis] = ()
    """Its earlier hypotheses, the latest last."""
    beliefs: Sequence[Belief] = ()
    """Its latest beliefs."""
    belief_weight: float | None = None
    """The weight, 0 to 1, that the scores give to its beliefs; None before they can tell. Earlier templates show it."""
    share: float | None = None
    """The share of the evaluations that it has now."""
    analysis: str = ""
    """Its last analysis."""
    start: Sequence[Suggestion] = ()
    """Before anything is scored: the start rows, which are scored without it and are among the `used`."""
    cards: Mapping[str, str] = field(default_factory=dict[str, str])
    """{short name of a model: an excerpt of its model card}."""
    texts: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict[str, Sequence[tuple[str, str]]])
    """{task: (question, right answer) of each search question, in the order of `Score.item_scores`}, shortened."""
    descriptions: Mapping[str, str] = field(default_factory=dict[str, str])
    """{task: its own description}, of those that have one."""
    chances: Mapping[str, float] = field(default_factory=dict[str, float])
    """{task: the metric of a model that guesses}, where it is known."""
    short: bool = False
    """Ask in a short form, for small models."""
    before_rules_4: bool = False
    """Read the answer as in logs with `rules` below 4."""
    budget_is_known: bool = True
    """False where minutes or cost bound the search, before they tell how many evaluations fit."""

    @cached_property
    def scored(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.score]

    @property
    def is_one_metric(self) -> bool:
        """Whether the score is the metric of the only task."""
        return not self.weights and [factor for factor, _ in self.tasks.values()] == [1.0]

    @cached_property
    def items(self) -> int:
        """The questions of a full evaluation; racing asks a stopped candidate fewer."""
        return max((trial.score.items for trial in self.scored if trial.score), default=0)

    @cached_property
    def whole(self) -> list[Trial]:
        """The trials that were asked all questions, best first."""
        full = [trial for trial in self.scored if trial.score and trial.score.items == self.items]
        return sorted(full, key=lambda trial: trial.value, reverse=True)

    @cached_property
    def inside(self) -> list[Trial]:
        """The scored points of the space. A parent may lie outside the user's bounds, or have no genes."""
        return [trial for trial in self.scored if trial.candidate.lies_in(self.space)]

    @cached_property
    def points(self) -> Array:
        """The trials inside, as points of the unit cube (trials, genes)."""
        return np.array([self.space.to_unit(trial.candidate.genes) for trial in self.inside])

    @cached_property
    def elites(self) -> list[Trial]:
        """The best trials, worst first: LLMs imitate the last most (EvoLLM, https://arxiv.org/abs/2402.18381)."""
        return sorted(self.inside, key=lambda trial: trial.value)[-ROWS:]

    @cached_property
    def best(self) -> Trial | None:
        """The best point with its score; None before the first score."""
        return max(self.inside, key=lambda trial: trial.value, default=None)

    @cached_property
    def incumbent(self) -> Genes:
        """The best point; the uniform merge before the first score."""
        return self.best.candidate.genes if self.best else self.space.clamp(self.space.uniform())

    @cached_property
    def parents(self) -> list[Trial]:
        return [trial for trial in self.scored if trial.candidate.origin == "parent"]


@dataclass(frozen=True)
class Reading:
    """The content of an answer."""

    proposals: list[Suggestion] = field(default_factory=list[Suggestion])
    analysis: str = ""
    problems: list[str] = field(default_factory=list[str])
    """Faults of the answer, and how each was handled."""
    beliefs: list[Belief] = field(default_factory=list[Belief])
    hypotheses: list[Hypothesis] = field(default_factory=list[Hypothesis])
    text: str = ""
    """The answer itself, for optimizers that continue the conversation."""
    lost: bool = False
    """True if no answer came."""


class Messages(Sequence[dict[str, str]]):
    """Messages that are written when they are first read: an answer that a log holds needs none."""

    def __init__(self, write: Callable[[], Sequence[dict[str, str]]]) -> None:
        self._write = write

    @cached_property
    def _written(self) -> tuple[dict[str, str], ...]:
        return tuple(self._write())

    @overload
    def __getitem__(self, index: int) -> dict[str, str]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[dict[str, str], ...]: ...
    def __getitem__(self, index: int | slice) -> dict[str, str] | tuple[dict[str, str], ...]:
        return self._written[index]

    def __len__(self) -> int:
        return len(self._written)

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(self._written)  # by the places, an IndexError of the writer would be taken for the end

    def __repr__(self) -> str:
        return repr(self._written)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._written == tuple(cast(Sequence[object], other))

    __hash__ = None  # pyright: ignore[reportAssignmentType]


@dataclass(frozen=True)
class Prompt(Request):
    """A request with the function that reads its answer."""

    read: Callable[[str], Reading] = field(kw_only=True)
    question: Question | None = None
    """Simulated LLMs answer from this."""
