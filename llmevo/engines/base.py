"""What an engine is."""

from collections.abc import Iterable
from typing import Protocol

from lm_eval.api.model import LM
from torch import Tensor


class Engine(Protocol):
    """One model in memory whose weights are replaced again and again."""

    @property
    def lm(self) -> LM:
        """The live model as lm-eval sees it."""
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights by (name, tensor) pairs of a checkpoint.

        Raises CandidateError when they do not fit. A load that fails halfway leaves weights of two candidates;
        the next complete load mends that.
        """
        ...
