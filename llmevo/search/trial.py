"""A candidate, its score, and the two together: what optimizers are asked for and told."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from llmevo.evaluation.score import Score
from llmevo.search.space import Genes

START_ROWS = ("parent", "uniform", "coefficient", "user")
"""Origins of what was there before the search, with nothing drawn."""


@dataclass(frozen=True)
class Suggestion:
    """A point an optimizer would like to see scored, and where it comes from."""

    genes: Genes
    origin: str
    """`llm`, or the numeric optimizer's name."""
    note: str = ""
    """Why: the LLM's reason, or what the numbers were drawn from."""
    kind: str = ""
    """What an LLM says it is: `refine`, `crossover`, `explore` or `mean`."""
    expected: float | None = None
    """The score that its proposer predicts: the surrogate or the LLM."""
    spread: tuple[str, ...] = ()
    """For each slice `tighter`, `same` or `wider`: how far from it an LLM wants others to be drawn."""


@dataclass(frozen=True)
class Candidate:
    """A point that was admitted to scoring."""

    id: int
    """Unique in the run, counted from 0 in the order of asking."""
    generation: int
    origin: str
    """`parent`, `uniform`, `coefficient`, `user`, `llm`, or the numeric optimizer's name."""
    genes: Genes
    note: str = ""
    expected: float | None = None
    """The score that its proposer predicted: the surrogate or the LLM."""


@dataclass(frozen=True)
class Trial:
    """A candidate with its score, or with the reason why it has none."""

    candidate: Candidate
    score: Score | None
    reason: str = ""
    """Why it has no score, or which constraints it violates."""
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    violation: float = 0.0
    """By how much it misses the constraints; 0 when it keeps them all, or there are none."""
    worth: float | None = None
    """What an optimizer is told to rank it by, where that is not the total: see `llmevo.search.objectives.valued`."""

    @property
    def value(self) -> float:
        """The number to rank by; a failed candidate ranks below every score."""
        if self.score is None:
            return -math.inf
        return self.score.total if self.worth is None else self.worth

    @property
    def rank(self) -> tuple[float, float]:
        """What to rank by where there are constraints: first by what is missed of them, least first, then by the score
        (Deb 2000, https://doi.org/10.1016/S0045-7825(99)00389-8). A failed candidate ranks last.
        """
        return (-self.violation if self.score else -math.inf, self.value)
