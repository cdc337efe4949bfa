"""Simultaneous perturbation: a gradient from two evaluations, however many genes there are."""

from collections.abc import Sequence

import numpy as np

from llmevo.search.optimizers.base import Setup
from llmevo.search.optimizers.population import Point, PopulationSearch

PERTURBATION = 0.1
"""How far from the point it looks at first, in shares of a gene's range."""


FIRST_STEP = 0.1
"""The mean change of a gene in the first step."""


GAIN_EXPONENT, PERTURBATION_EXPONENT = 0.602, 0.101
"""How fast steps and perturbations shrink (Spall 1998, section III)."""


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

    def begin(self, start: Point) -> None:
        self._centre = start

    def draw(self) -> list[Point]:
        self._signs = self._random.choice([-1.0, 1.0], len(self._centre))
        return [np.clip(self._centre + side * self.sigma * self._signs, 0.0, 1.0) for side in (1, -1)]

    def learn(self, points: Sequence[Point], costs: Sequence[float]) -> None:
        self._step += 1
        # Points are told in the order of their scores' arrival, which may be any.
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
        # A step no longer than the first, whatever the noise.
        change = np.clip(gain * slope, -FIRST_STEP, FIRST_STEP) * self._signs
        self._centre = np.clip(self._centre - change, 0.0, 1.0)
