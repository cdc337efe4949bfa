"""What the scores so far say of points not yet scored: a Gaussian process."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from scipy.special import ndtri
from scipy.stats import rankdata

Array = NDArray[np.float64]

ROOT5 = np.sqrt(5.0)
JITTER = 1e-8

LENGTH_SPREAD = 1.0
"""Standard deviation of a length scale's logarithm, before any score is seen."""

NOISE_CENTRE, NOISE_SPREAD = np.log(1e-2), 1.5
"""Of the noise variance's logarithm, where scores have variance 1."""

BOUNDS = ((-4.0, 5.0), (-3.0, 4.0), (-10.0, 1.0))
"""Of the logarithms of length scales, signal variance and noise variance."""

STEPS = 6
"""Quasi-Newton steps each time; every fit goes on from the one before."""


def normal_scores(values: Sequence[float]) -> Array:
    """Ranks as quantiles of the normal distribution (Blom 1958): outliers and failures (-inf) lose their weight."""
    ranks = rankdata(values)
    return np.asarray(ndtri((ranks - 0.375) / (len(ranks) + 0.25)), dtype=np.float64)


class GaussianProcess:
    """Matérn-5/2 with one length scale a feature (Rasmussen and Williams 2006, chapters 4 and 5).

    The length scales' prior grows with the root of the number of features, as distances do; without that a Gaussian
    process learns nothing in forty dimensions (Hvarfner et al., https://arxiv.org/abs/2402.02229). The parameters
    are those of the highest posterior density, sought by gradient; scikit-learn's process has no such priors and its
    gradient takes a matrix per feature. The predictions are tested against scikit-learn's.
    """

    def __init__(self, features: int) -> None:
        self._length_centre = np.log(0.5 * np.sqrt(max(features, 1)))
        self._logs = np.concatenate([np.full(features, self._length_centre), [0.0, NOISE_CENTRE]])
        self._points = np.empty((0, features))
        self._values = np.empty(0)
        self._floor = 0.0

    @property
    def length_scales(self) -> Array:
        """In the features' own units."""
        return np.exp(self._logs[:-2])

    @property
    def signal(self) -> float:
        """Variance of what the features explain."""
        return float(np.exp(self._logs[-2]))

    @property
    def noise(self) -> float:
        """Variance of what they do not."""
        return float(np.exp(self._logs[-1])) + self._floor

    def fit(self, points: Array, values: Array, floor: float = 0.0) -> None:
        """Learn from points and their normal scores; `floor` is the least variance that the noise may have."""
        self._points, self._values, self._floor = points, values, floor
        bounds = [BOUNDS[0]] * (len(self._logs) - 2) + [BOUNDS[1], BOUNDS[2]]
        limits: Any = {"maxiter": STEPS, "maxfun": 2 * STEPS}
        found = minimize(self._loss, self._logs, jac=True, method="L-BFGS-B", bounds=bounds, options=limits)
        self._logs = found.x
        covariance, _, _ = self._kernel(self._points)
        covariance[np.diag_indices(len(points))] += self.noise + JITTER
        self._factor = cho_factor(covariance, lower=True)
        self._weights = cho_solve(self._factor, values)

    def mean(self, points: Array) -> Array:
        """The expected normal scores."""
        return self._kernel(points)[0] @ self._weights

    def predict(self, points: Array) -> tuple[Array, Array]:
        """The expected normal scores and their standard deviations, without the noise of scoring."""
        covariance, _, _ = self._kernel(points)
        reduced = solve_triangular(self._factor[0], covariance.T, lower=True)
        variance = self.signal - (reduced**2).sum(axis=0)
        return covariance @ self._weights, np.sqrt(np.maximum(variance, 0.0))

    def gradient(self, points: Array) -> tuple[Array, Array]:
        """The expected normal scores and how they change along each feature."""
        covariance, slope, scaled = self._kernel(points)
        pull = slope * self._weights
        towards = pull @ (self._points / self.length_scales) - pull.sum(axis=1, keepdims=True) * scaled
        return covariance @ self._weights, towards / self.length_scales

    def _kernel(self, points: Array) -> tuple[Array, Array, Array]:
        """Covariances with what was learnt, their slope over the squared distance, and the scaled points."""
        scaled = points / self.length_scales
        distance = cdist(scaled, self._points / self.length_scales)
        decay = self.signal * np.exp(-ROOT5 * distance)
        slope = 5 / 3 * (1 + ROOT5 * distance) * decay
        return (1 + ROOT5 * distance + 5 / 3 * distance**2) * decay, slope, scaled

    def _loss(self, logs: Array) -> tuple[float, Array]:
        """The negative logarithm of the posterior density of the parameters, and its gradient."""
        self._logs = logs
        covariance, slope, scaled = self._kernel(self._points)
        noisy = covariance.copy()
        noisy[np.diag_indices(len(noisy))] += self.noise + JITTER
        try:
            factor = cho_factor(noisy, lower=True)
        except LinAlgError:
            return 1e10, np.zeros_like(logs)
        weights = cho_solve(factor, self._values)
        loss = 0.5 * self._values @ weights + np.log(np.diag(factor[0])).sum()
        change = cho_solve(factor, np.eye(len(noisy))) - np.outer(weights, weights)
        along = change * slope
        gradient = np.empty_like(logs)
        gradient[:-2] = along.sum(axis=1) @ scaled**2 - (scaled * (along @ scaled)).sum(axis=0)
        gradient[-2] = 0.5 * (change * covariance).sum()
        gradient[-1] = 0.5 * np.trace(change) * np.exp(logs[-1])
        centres = np.concatenate([np.full(len(logs) - 2, self._length_centre), [0.0, NOISE_CENTRE]])
        spreads = np.concatenate([np.full(len(logs) - 2, LENGTH_SPREAD), [1.0, NOISE_SPREAD]])
        off = (logs - centres) / spreads
        return float(loss + 0.5 * off @ off), gradient + off / spreads
