"""The question put to the LLM each generation, free of any wording."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llmevo.llm.client import Request
from llmevo.search.space import Genes, SearchSpace
from llmevo.search.trial import Suggestion, Trial

ROWS = 12
"""Trials shown at most: the prompt is rebuilt from these each time and so never grows."""


@dataclass(frozen=True)
class SliceGeometry:
    """How large a slice's task vectors are and how alike: facts about the weights that no gene changes."""

    slice: str
    norms: Mapping[str, float]
    """‖task vector‖ / ‖base‖ of each model, by its short name."""
    cosines: Mapping[str, float]
    """Between each two models' task vectors, by `first/second`."""


@dataclass(frozen=True)
class Question:
    """Everything the LLM may know when it is asked for the next candidates."""

    space: SearchSpace
    trials: Sequence[Trial]
    """All trials so far."""
    tasks: Mapping[str, tuple[float, str]]
    """Each task's weight and the metric that counts."""
    wanted: int
    """How many proposals are asked for."""
    generation: int
    sigma: float
    """The mutation step size around the proposals, in shares of a gene's range."""
    used: int
    """Evaluations spent."""
    budget: int
    suggestions: Sequence[tuple[Genes, float, float]] = ()
    """What the statistics would try next: genes, predicted score and its standard deviation, the best first."""
    predictions: Sequence[tuple[float, float]] = ()
    """What the LLM predicted for its earlier proposals and what came of them, the latest last."""
    geometry: Sequence[SliceGeometry] = ()
    """What the weights say of each slice; empty where nobody has measured it."""
    mask_names: bool = False
    """Hide the names of models, tasks and parameters."""
    constraints: Sequence[str] = ()
    """What a recipe must keep, such as `arc >= parent - 0.01`; trials that do not say so as their reason."""
    weights: Mapping[str, float] = field(default_factory=dict[str, float])
    """Where every task is an aim of its own: what each counts this time. Empty where the score is their sum."""

    @cached_property
    def scored(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.score]

    @cached_property
    def inside(self) -> list[Trial]:
        """The scored points of the space. A parent may be none: outside the user's bounds, or without genes."""
        return [trial for trial in self.scored if self.space.contains(trial.candidate.genes)]

    @cached_property
    def points(self) -> NDArray[np.float64]:
        """(trials inside, genes): where they lie in the unit cube."""
        return np.array([self.space.to_unit(trial.candidate.genes) for trial in self.inside])

    @cached_property
    def elites(self) -> list[Trial]:
        """The best trials, worst first: what stands last is imitated most (EvoLLM, https://arxiv.org/abs/2402.18381)."""
        return sorted(self.inside, key=lambda trial: trial.value)[-ROWS:]

    @cached_property
    def incumbent(self) -> Genes:
        """The best point so far; the uniform merge before there is any."""
        best = max(self.inside, key=lambda trial: trial.value, default=None)
        return best.candidate.genes if best else self.space.clamp(self.space.uniform())

    @cached_property
    def parents(self) -> list[Trial]:
        return [trial for trial in self.scored if trial.candidate.origin == "parent"]


@dataclass(frozen=True)
class Reading:
    """What was understood of an answer."""

    proposals: list[Suggestion] = field(default_factory=list[Suggestion])
    analysis: str = ""
    problems: list[str] = field(default_factory=list[str])
    """What was wrong with the answer, and what was done about it."""
    text: str = ""
    """The answer itself, where whoever asked wants to go on from it."""
    lost: bool = False
    """Whether it was asked for and none came."""


@dataclass(frozen=True)
class Prompt(Request):
    """A request with the function that reads its answer."""

    read: Callable[[str], Reading] = field(kw_only=True)
    question: Question | None = None
    """What was asked, free of any wording: simulated LLMs answer from it."""
