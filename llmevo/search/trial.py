"""Suggestions, which optimizers return; candidates, which are evaluated; and trials, which optimizers are told."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmevo.evaluation.score import Score
from llmevo.search.space import Genes, SearchSpace

START_ROWS = ("parent", "uniform", "coefficient", "user")
"""Origins of candidates that are scored before the search, with nothing random."""


@dataclass(frozen=True)
class Suggestion:
    """A point that an optimizer proposes."""

    genes: Genes
    origin: str
    """`llm`, or the numeric optimizer's name."""
    note: str = ""
    """The LLM's reason, or the source of the numbers."""
    kind: str = ""
    """The LLM's word for it: `refine`, `crossover`, `explore` or `mean`."""
    expected: float | None = None
    """The score that its proposer predicts: the surrogate or the LLM."""
    spread: tuple[str, ...] = ()
    """For each slice `tighter`, `same` or `wider`: the LLM's width for samples around the point."""
    purpose: str = ""
    """The LLM's aim: `exploit` for a high score, `learn` for a recipe that decides a question."""
    predicted: Mapping[str, float] = field(default_factory=dict[str, float])
    """{task: the score that the LLM predicts}."""
    path: str = ""
    """A layer path in its text form; the genes are then of the weight merge in it, or none. Empty for a whole merge."""


@dataclass(frozen=True)
class Candidate:
    """A point that is evaluated."""

    id: int
    """Unique in the run, counted from 0."""
    generation: int
    origin: str
    """`parent`, `uniform`, `coefficient`, `user`, `llm`, or the numeric optimizer's name."""
    genes: Genes
    note: str = ""
    expected: float | None = None
    """The score that its proposer predicted: the surrogate or the LLM."""
    path: str = ""
    """See `Suggestion`."""

    @property
    def suggestion(self) -> Suggestion:
        """The point as it was proposed."""
        return Suggestion(self.genes, self.origin, self.note, expected=self.expected, path=self.path)

    def lies_in(self, space: SearchSpace) -> bool:
        """Return whether this is a point of the space of weights: no layer path, and inside the bounds."""
        return not self.path and space.contains(self.genes)


@dataclass(frozen=True)
class Trial:
    """A candidate with its score, or with the reason of its failure."""

    candidate: Candidate
    score: Score | None
    reason: str = ""
    """The reason of the failure, or the violated constraints."""
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    violation: float = 0.0
    """The sum of its shortfalls from the constraints; 0 where it satisfies all."""
    scalarized: float | None = None
    """The value for optimizers where it is not the total: see `objectives.scalarize`."""

    @property
    def value(self) -> float:
        """The number that optimizers maximize; -inf for a failed candidate."""
        if self.score is None:
            return -math.inf
        return self.score.total if self.scalarized is None else self.scalarized

    @property
    def rank(self) -> tuple[float, float]:
        """The sort key with constraints, ascending: first the violation, then the score (Deb 2000,
        https://doi.org/10.1016/S0045-7825(99)00389-8).
        """
        return (-self.violation if self.score else -math.inf, self.value)
