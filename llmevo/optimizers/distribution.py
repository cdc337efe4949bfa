"""The Gaussian that candidates are drawn from, moved and shaped by CMA-ES."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Distribution:
    """N(mean, step size² · covariance) over the unit cube, updated by the library `cmaes`.

    The only place that knows the library's internals. `axes` are the covariance's root, so that
    `mean + sigma * axes @ z` is a sample for a standard normal z.
    """

    def __init__(self, mean: Array, sigma: float, population: int, separable: bool, seed: int) -> None:
        from cmaes import CMA, SepCMA

        kind: Any = SepCMA if separable else CMA
        bounds = np.tile([0.0, 1.0], (len(mean), 1))
        self._separable = separable
        self._strategy: Any = kind(mean.copy(), sigma, bounds=bounds, seed=seed, population_size=population)
        self.population = population

    @property
    def mean(self) -> Array:
        return self._strategy._mean

    @property
    def sigma(self) -> float:
        """The step size in shares of a gene's range."""
        return float(self._strategy._sigma)

    @sigma.setter
    def sigma(self, sigma: float) -> None:
        self._strategy._sigma = sigma

    def root(self) -> tuple[Array, Array]:
        """The covariance's eigenvectors (columns) and the roots of its eigenvalues."""
        if self._separable:
            return np.eye(len(self.mean)), np.sqrt(self._strategy._C)
        return self._strategy._eigen_decomposition()

    @property
    def axes(self) -> Array:
        vectors, lengths = self.root()
        return vectors * lengths

    def lengths(self, points: Array) -> Array:
        """How far points are from the mean, in standard deviations."""
        vectors, lengths = self.root()
        return np.linalg.norm((points - self.mean) @ vectors / lengths, axis=-1) / self.sigma

    def tell(self, points: Sequence[Array], costs: Sequence[float]) -> None:
        """A population's costs, to be minimised.

        Points further off than a sample would be are moved towards the mean first (Hansen 2011, "Injecting external
        solutions into CMA-ES", https://arxiv.org/abs/1110.4181, equation 4): they may lead, never throw.
        """
        size = len(self.mean)
        most = np.sqrt(size) + 2 * size / (size + 2)
        told: list[tuple[Array, float]] = []
        for point, cost in zip(points, costs, strict=True):
            share = min(1.0, most / max(float(self.lengths(point)), 1e-12))
            told.append((self.mean + share * (point - self.mean), cost))
        self._strategy.tell(told)
