"""The Gaussian that candidates are drawn from, moved and shaped by CMA-ES."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Distribution:
    """N(mean, step size² · covariance) over the unit cube, updated by the library `cmaes`.

    The only place that knows the library's internals. `axes` are the covariance's symmetric root, so that
    `mean + sigma * axes @ z` is a sample for a standard normal z.
    """

    def __init__(self, mean: Array, sigma: float, population: int, seed: int) -> None:
        from cmaes import CMA

        bounds = np.tile([0.0, 1.0], (len(mean), 1))
        self._strategy: Any = CMA(mean.copy(), sigma, bounds=bounds, seed=seed, population_size=population)
        self.population = population

    @property
    def mean(self) -> Array:
        return self._strategy._mean

    @mean.setter
    def mean(self, mean: Array) -> None:
        self._strategy._mean = mean.copy()

    @property
    def sigma(self) -> float:
        """The step size in shares of a gene's range."""
        return float(self._strategy._sigma)

    @sigma.setter
    def sigma(self, sigma: float) -> None:
        self._strategy._sigma = sigma

    @property
    def axes(self) -> Array:
        vectors, lengths = self._strategy._eigen_decomposition()
        return (vectors * lengths) @ vectors.T  # the same on every processor: an eigenvector's sign is anybody's choice

    def distances(self, points: Array, other: Array) -> Array:
        """How far points are from another, in standard deviations."""
        vectors, lengths = self._strategy._eigen_decomposition()
        return np.linalg.norm((points - other) @ vectors / lengths, axis=-1) / self.sigma

    def tell(self, points: Sequence[Array], costs: Sequence[float]) -> None:
        """Costs, to be minimised, of a population or a part of it.

        Points further off than a sample would be are moved towards the mean first (Hansen 2011, "Injecting external
        solutions into CMA-ES", https://arxiv.org/abs/1110.4181, equation 4): they may lead, never throw. The places of
        those missing are taken by the mean as the worst: a step of nothing moves nothing.
        """
        size = len(self.mean)
        most = np.sqrt(size) + 2 * size / (size + 2)
        told: list[tuple[Array, float]] = []
        for point, cost in zip(points, costs, strict=True):
            share = min(1.0, most / max(float(self.distances(point, self.mean)), 1e-12))
            told.append((self.mean + share * (point - self.mean), cost))
        for start in range(0, len(told), self.population):
            part = told[start : start + self.population]
            self._strategy.tell(part + [(self.mean.copy(), np.inf)] * (self.population - len(part)))


LEGACY = (0.05, 0.2)
"""LLM-Evo-Merge's `sigma_low` after an improvement, `sigma_high` otherwise."""


SMALLEST, LARGEST = 1e-3, 0.5


def next_sigma(rule: str, before: float, adapted: float, improved: bool, genes: int) -> float:
    """The step size of the next generation.

    `csa` and `llm`: `adapted`, what CMA-ES makes of the path's length (Hansen, https://arxiv.org/abs/1604.00772,
    equation 44). `success`: longer after an improvement, shorter otherwise, steady at one improvement in five
    (Rechenberg 1973; Kern et al. 2004). `legacy`: one of LLM-Evo-Merge's two. All are shares of a gene's range.
    """
    if rule == "legacy":
        return LEGACY[0] if improved else LEGACY[1]
    if rule == "success":
        damping = math.sqrt(genes + 1)
        adapted = before * math.exp(1 / damping if improved else -1 / (4 * damping))
    return min(max(adapted, SMALLEST), LARGEST)


def spread_factors(spread: tuple[str, ...]) -> list[float]:
    """What an LLM's words for each slice mean: a share of the step size."""
    return [{"tighter": 0.5, "wider": 2.0}.get(word, 1.0) for word in spread]
