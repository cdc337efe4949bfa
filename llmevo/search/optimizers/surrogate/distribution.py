"""The Gaussian that candidates are drawn from, moved and shaped by CMA-ES."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


SMALLEST, LARGEST = 1e-3, 0.5
"""Bounds of the step size, as shares of a gene's range."""


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
        self.sigma = min(max(self.sigma, SMALLEST), LARGEST)


def spread_factors(spread: tuple[str, ...]) -> list[float]:
    """What an LLM's words for each slice mean: a share of the step size."""
    return [{"tighter": 0.5, "wider": 2.0}.get(word, 1.0) for word in spread]
