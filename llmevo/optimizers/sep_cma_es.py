"""CMA-ES with a diagonal covariance."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmevo.optimizers.base import Setup
from llmevo.optimizers.cma_es import SIGMA
from llmevo.optimizers.population import Point, PopulationSearch, at_least_two


class SepCmaEs(PopulationSearch):
    """Learns one step size a gene and no correlations (Ros and Hansen 2008), so it learns sooner.

    From the best start row with step size 1/6. Use it for a hundred genes and more.
    """

    origin = "sep-cma-es"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._strategy: Any = None

    @property
    def sigma(self) -> float:
        return min(float(self._strategy._sigma), 1.0) if self._strategy else SIGMA

    def begin(self, start: Point) -> None:
        from cmaes import SepCMA

        padded = at_least_two(start)
        bounds = np.tile([0.0, 1.0], (len(padded), 1))
        seed = int(self._random.integers(2**31))
        self._strategy = SepCMA(mean=padded, sigma=SIGMA, bounds=bounds, seed=seed)

    def draw(self) -> list[Point]:
        return [self._strategy.ask() for _ in range(self._strategy.population_size)]

    def learn(self, points: Sequence[Point], costs: Sequence[float]) -> None:
        self._strategy.tell([*zip(points, costs, strict=True)])
