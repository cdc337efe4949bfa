"""The (1+1) evolution strategy with the 1/5 rule."""

import math
from collections.abc import Sequence

import numpy as np

from llmevo.search.optimizers.base import Setup
from llmevo.search.optimizers.population import Point, PopulationSearch

SIGMA = 0.1


SMALLEST, LARGEST = 1e-4, 1.0
"""Bounds of the step size; the smaller is the grid of the genes."""


class OnePlusOne(PopulationSearch):
    """One Gaussian step from the best trial so far; longer steps after a success, shorter ones after a failure.

    The step size stays where one step in five succeeds (Rechenberg 1973, in the form of Kern et al. 2004). Use it
    as the simplest baseline with a memory; noise traps it, for it never leaves a point that was lucky.
    """

    origin = "one-plus-one"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._sigma = SIGMA
        self._to_beat = -np.inf

    @property
    def sigma(self) -> float:
        return self._sigma

    def begin(self, start: Point) -> None:
        """It starts from the best start row."""

    def draw(self) -> list[Point]:
        self._to_beat = self._best_value
        centre = self._best[self._numbers]
        return [np.clip(centre + self._sigma * self._random.standard_normal(len(centre)), 0.0, 1.0)]

    def learn(self, points: Sequence[Point], costs: Sequence[float]) -> None:
        damping = math.sqrt(len(self._numbers) + 1)
        step = 1 / damping if -costs[0] > self._to_beat else -1 / (4 * damping)
        self._sigma = min(max(self._sigma * math.exp(step), SMALLEST), LARGEST)
