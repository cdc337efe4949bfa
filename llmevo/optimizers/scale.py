"""Scores as a model learns them, with variance one, and back."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmevo.prompting.evidence import rank_normal
from llmevo.trial import Trial

Array = NDArray[np.float64]


def noise_of(trials: Sequence[Trial]) -> float:
    """The variance of the scores' errors as a share of the scores' variance, one at most."""
    scores = [trial.score for trial in trials if trial.score]
    error = float(np.median([score.stderr for score in scores])) if scores else 0.0
    spread = float(np.std([score.total for score in scores])) if scores else 0.0
    return min(1.0, (error / spread) ** 2) if spread else float(error > 0)


class Scale:
    """From scores to what a Gaussian process learns.

    Exact scores become the normal quantiles of their ranks, so that outliers lose their weight. Noisy ones are only
    moved and divided by their standard deviation: ranks would make more of the noise where scores lie close.
    Failures (-inf) share the lowest place.
    """

    def __init__(self, scores: Sequence[float], noisy: bool) -> None:
        finite = [score for score in scores if np.isfinite(score)]
        self._scores = np.maximum(scores, min(finite, default=0.0))
        self.values: Array = _standardised(self._scores) if noisy else rank_normal(scores)
        """The scores, in the order given."""

    def score(self, value: float) -> float:
        """The score at a value; beyond those seen the lowest or highest."""
        return float(np.interp(value, np.sort(self.values), np.sort(self._scores)))


def _standardised(scores: Array) -> Array:
    return (scores - scores.mean()) / max(float(scores.std()), 1e-12)
