"""A Gaussian process with a Matérn kernel, a length scale for each feature, and a prior mean with a learnt weight."""

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy  # its parts are loaded at their first use

from llmevo.search.space import Array

ROOT5 = np.sqrt(5.0)
JITTER = 1e-8
CENTRES = np.log([0.5, 1.0, 0.05])  # of length scale, signal variance and noise variance, where scores have variance 1
FEATURES = 8  # the number of features for which this length scale is meant
SPREADS = np.array([1.0, 1.0, 1.5])  # the priors' standard deviations of these logarithms
RELEVANCE = 0.5  # the prior's standard deviation of the logarithm of a feature's own factor of the length scale
BOUNDS = ((-3.0, 3.0), (-4.0, 4.0))
LEAST_NOISE, MOST_NOISE = -9.0, 1.0
FACTOR_BOUNDS = (-2.0, 2.0)
STEPS = 30  # quasi-Newton steps of a fit

WEIGHTS = np.array([0.0, 0.3, 1.0, 3.0])  # of the prior mean, in standard deviations of the scores
WEIGHT_PRIOR = np.log([0.4, 0.2, 0.2, 0.2])

Mean = Callable[[Array], Array]
"""A prior mean: features (points, size) to values, but for its weight and a constant."""


class MaternProcess:
    """A Gaussian process with a Matérn-5/2 kernel (Rasmussen and Williams 2006, equation 4.17) and automatic relevance
    determination: the features share a length scale, and each has a factor of its own whose logarithm is normal with
    standard deviation `RELEVANCE`, so that few scores cannot tell features apart by chance. The prior of the length
    scale grows with the root of the number of features, as distances do (Hvarfner et al. 2024,
    https://arxiv.org/abs/2402.02229).

    The parameters maximize the posterior density; each fit starts at those of the one before, and at the prior's
    centres. A prior mean φ enters as κ·(φ − its mean over the learnt points), κ ≥ 0 with prior mass at 0. As the mean
    of the process is linear in κ, the posterior mean of κ replaces the average over it.
    """

    def __init__(self, features: int, least_noise: float = LEAST_NOISE) -> None:
        """`least_noise` is the least logarithm of the noise variance, where scores have variance 1."""
        self._size = features
        self._bounds = [*BOUNDS, (least_noise, MOST_NOISE), *[FACTOR_BOUNDS] * features]
        self._logs = self._centres
        self.belief = 0.0
        """The posterior mean of κ."""
        self.belief_probability: float | None = None
        """P(κ > 0); None without a prior mean."""

    @property
    def noise(self) -> float:
        """The variance of the noise, where scores have variance 1."""
        return float(np.exp(self._logs[2]))

    @property
    def _centres(self) -> Array:
        centres = np.concatenate([CENTRES, np.zeros(self._size)])
        centres[0] += 0.5 * np.log(max(self._size, 1) / FEATURES)
        return centres

    def fit(self, points: Array, values: Array, mean: Mean | None = None, adapt: bool = True) -> None:
        """Learn from features (points, size) and scores with mean 0 and variance 1. Without `adapt` the parameters stay
        as they are.
        """
        self._points, self._values, self._mean = points, values, mean
        if adapt:
            limits: Any = {"maxiter": STEPS}
            fits: list[Any] = [
                scipy.optimize.minimize(
                    self._loss, start, jac=True, method="L-BFGS-B", bounds=self._bounds, options=limits
                )
                for start in (self._logs, self._centres)
            ]
            self._logs = min(fits, key=lambda fit: fit.fun).x
        covariance = self._kernel(points, points)
        covariance[np.diag_indices(len(points))] += np.exp(self._logs[2]) + JITTER
        self._factor = scipy.linalg.cho_factor(covariance, lower=True)
        self._weights = scipy.linalg.cho_solve(self._factor, values)
        self.belief, self.belief_probability = 0.0, None
        if mean is not None:
            self._learn_belief(mean(points))

    def _learn_belief(self, believed: Array) -> None:
        """The posterior of κ: the marginal likelihood is Gaussian in it (equation 2.30)."""
        self._offset = float(believed.mean())
        centred = believed - self._offset
        solved = scipy.linalg.cho_solve(self._factor, centred)
        fit = WEIGHT_PRIOR + WEIGHTS * (centred @ self._weights) - 0.5 * WEIGHTS**2 * (centred @ solved)
        posterior = np.exp(fit - fit.max())
        posterior /= posterior.sum()
        self.belief, self.belief_probability = float(posterior @ WEIGHTS), float(1 - posterior[0])
        self._weights = self._weights - self.belief * solved

    def mean(self, points: Array) -> Array:
        """Return the expected scores (equation 2.25)."""
        return self._expected(points, self._kernel(points, self._points))

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Return the expected scores and their standard deviations without noise (equations 2.25 and 2.26)."""
        covariance = self._kernel(points, self._points)
        reduced = scipy.linalg.solve_triangular(self._factor[0], covariance.T, lower=True)
        variances = np.exp(self._logs[1]) - (reduced**2).sum(axis=0)
        return self._expected(points, covariance), np.sqrt(np.maximum(variances, 0.0))

    def _expected(self, points: Array, covariance: Array) -> Array:
        expected = covariance @ self._weights
        if self._mean is not None and self.belief:
            expected = expected + self.belief * (self._mean(points) - self._offset)
        return expected

    def _kernel(self, points: Array, others: Array) -> Array:
        rates = np.exp(-self._logs[0] - self._logs[3:])
        distances = scipy.spatial.distance.cdist(points * rates, others * rates)
        return np.exp(self._logs[1]) * (1 + ROOT5 * distances + 5 / 3 * distances**2) * np.exp(-ROOT5 * distances)

    def _loss(self, logs: Array) -> tuple[float, Array]:
        """The negative logarithm of the parameters' posterior density and its gradient (equations 2.30, 5.9)."""
        scaled = self._points * np.exp(-logs[0] - logs[3:])
        distances = scipy.spatial.distance.cdist(scaled, scaled)
        decay = np.exp(logs[1] - ROOT5 * distances)
        matern = (1 + ROOT5 * distances + 5 / 3 * distances**2) * decay
        covariance = matern.copy()
        covariance[np.diag_indices(len(covariance))] += np.exp(logs[2]) + JITTER
        try:
            factor = scipy.linalg.cho_factor(covariance, lower=True)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros_like(logs)
        weights = scipy.linalg.cho_solve(factor, self._values)
        change = scipy.linalg.cho_solve(factor, np.eye(len(covariance))) - np.outer(weights, weights)
        # Of the kernel over the logarithm of a feature's factor: slope · (squared distance in that feature).
        pull = change * (5 / 3 * (1 + ROOT5 * distances) * decay)
        squares = scaled**2
        by_feature = 2 * (pull.sum(axis=1) @ squares) - 2 * (scaled * (pull @ scaled)).sum(axis=0)
        gradient = 0.5 * np.concatenate(
            [[by_feature.sum(), (change * matern).sum(), np.exp(logs[2]) * np.trace(change)], by_feature]
        )
        spreads = np.concatenate([SPREADS, np.full(self._size, RELEVANCE)])
        off = (logs - self._centres) / spreads
        loss = 0.5 * (self._values @ weights + off @ off) + np.log(np.diag(factor[0])).sum()
        return float(loss), gradient + off / spreads
