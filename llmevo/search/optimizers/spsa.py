"""Simultaneous perturbation: a gradient from two evaluations, however many genes there are."""

from collections.abc import Sequence

import numpy as np

from llmevo.search.optimizers.base import Setup
from llmevo.search.optimizers.population import PopulationSearch
from llmevo.search.space import Array

PERTURBATION = 0.1  # the first distance of the two evaluated points from the centre, a share of a gene's range
FIRST_STEP = 0.1  # the mean change of a gene in the first step
GAIN_EXPONENT, PERTURBATION_EXPONENT = 0.602, 0.101  # α and γ of Spall 1998, section III


class Spsa(PopulationSearch):
    """Simultaneous perturbation stochastic approximation (Spall 1992, with the gains of Spall 1998).

    From the best start row. Use it where there are very many genes and every score is noisy.
    """

    origin = "spsa"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._step = 0
        self._gain: float | None = None
        self._centre = np.empty(0)
        self._signs = np.empty(0)

    @property
    def sigma(self) -> float:
        return PERTURBATION / (self._step + 1) ** PERTURBATION_EXPONENT

    def begin(self, start: Array) -> None:
        self._centre = start

    def draw(self) -> list[Array]:
        self._signs = self._random.choice([-1.0, 1.0], len(self._centre))
        return [np.clip(self._centre + side * self.sigma * self._signs, 0.0, 1.0) for side in (1, -1)]

    def learn(self, points: Sequence[Array], costs: Sequence[float]) -> None:
        self._step += 1
        # The two points come in any order.
        difference = {
            float(np.dot(point - self._centre, self._signs)) > 0: cost
            for point, cost in zip(points, costs, strict=True)
        }
        if len(difference) < 2 or not np.isfinite([*difference.values()]).all():
            return
        slope = (difference[True] - difference[False]) / (2 * self.sigma)
        stability = 0.1 * self._budget / 2
        if self._gain is None and slope:
            self._gain = FIRST_STEP * (stability + 1) ** GAIN_EXPONENT / abs(slope)
        gain = (self._gain or 0.0) / (stability + self._step) ** GAIN_EXPONENT
        change = np.clip(gain * slope, -FIRST_STEP, FIRST_STEP) * self._signs
        self._centre = np.clip(self._centre - change, 0.0, 1.0)
