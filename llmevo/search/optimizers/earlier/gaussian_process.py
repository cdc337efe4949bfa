"""The Gaussian process of the scores in logs with `rules` below 3; later ones have `matern_process`."""

from typing import Any

import numpy as np
import scipy  # its parts are loaded at their first use

from llmevo.search.space import Array

ROOT5 = np.sqrt(5.0)
JITTER = 1e-8
LENGTH_SPREAD = 1.0  # the prior's standard deviation of the logarithm of the length scale
SIGNAL_CENTRE = -1.0  # the prior's mean of the logarithm of the signal variance, where scores have variance 1
NOISE_CENTRE, NOISE_SPREAD = np.log(1e-2), 1.5  # the prior of the logarithm of the noise variance
BOUNDS = ((-4.0, 5.0), (-6.0, 4.0), (-10.0, 1.0), (-12.0, 4.0))  # of the logarithms of the four parameters
STEPS = 6  # quasi-Newton steps of a fit; each fit starts at the parameters of the one before


class GaussianProcess:
    """A Gaussian process: a quadratic of all features plus a Matérn-5/2 term with one length scale.

    Near its optimum a surface is nearly quadratic, and a quadratic is learnt from few scores (Rasmussen and Williams
    2006, "Gaussian Processes for Machine Learning", section 2.7; local quadratics in CMA-ES: Kern et al. 2006). A
    length scale for each feature cannot be learnt from a hundred scores: regret was 1.3 to 1.8 times as high on half of
    BBOB. The prior of the length scale grows with the root of the number of features, as distances do (Hvarfner et al.,
    https://arxiv.org/abs/2402.02229). The parameters maximize the posterior density; each fit starts at those of the
    one before. scikit-learn's process has neither priors nor the mean's gradient. Equations are Rasmussen and
    Williams'.
    """

    def __init__(self, features: int) -> None:
        self._centres = np.array([np.log(0.5 * np.sqrt(max(features, 1))), SIGNAL_CENTRE, NOISE_CENTRE, 0.0])
        self._spreads = np.array([LENGTH_SPREAD, 1.0, NOISE_SPREAD, 1.0])
        self._logs = self._centres.copy()
        self._unit = np.sqrt(12 / max(features, 1))  # so that the squares of a random point's features add up to one
        self._points = np.empty((0, features))
        self._distances = np.empty((0, 0))
        self._products = np.empty((0, 0))
        self._values = np.empty(0)
        self._floor = 0.0

    @property
    def length_scale(self) -> float:
        return float(np.exp(self._logs[0]))

    @property
    def signal(self) -> float:
        """The variance of the Matérn term."""
        return float(np.exp(self._logs[1]))

    @property
    def noise(self) -> float:
        """The variance of the scores around the surface."""
        return float(np.exp(self._logs[2])) + self._floor

    @property
    def quadratic(self) -> float:
        """The variance of the quadratic's coefficients."""
        return float(np.exp(self._logs[3]))

    def fit(self, points: Array, values: Array, floor: float = 0.0, adapt: bool = True) -> None:
        """Learn from features (points, size) and their scaled scores.

        `floor` is the least variance of the noise. Without `adapt` the parameters stay as they are.
        """
        self._points, self._values, self._floor = points, values, floor
        self._distances, self._products = _distances(points, points), self._product(points)
        if adapt:
            limits: Any = {"maxiter": STEPS, "maxfun": 2 * STEPS}
            found = scipy.optimize.minimize(
                self.loss, self._logs, jac=True, method="L-BFGS-B", bounds=BOUNDS, options=limits
            )
            self._logs = found.x
        covariance = self._matern(self._distances)[0] + self.quadratic * self._products**2
        covariance[np.diag_indices(len(points))] += self.noise + JITTER
        self._factor = scipy.linalg.cho_factor(covariance, lower=True)
        self._weights = scipy.linalg.cho_solve(self._factor, values)

    def mean(self, points: Array) -> Array:
        """Return the expected scores (equation 2.25)."""
        return self._covariance(points) @ self._weights

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Return the expected scores and their standard deviations without noise (equations 2.25 and 2.26)."""
        covariance = self._covariance(points)
        reduced = scipy.linalg.solve_triangular(self._factor[0], covariance.T, lower=True)
        before = self.signal + self.quadratic * (1 + (self._centred(points) ** 2).sum(axis=1)) ** 2
        return covariance @ self._weights, np.sqrt(np.maximum(before - (reduced**2).sum(axis=0), 0.0))

    def left_out(self) -> tuple[Array, Array]:
        """Return the leave-one-out expectations of the learnt points and their standard deviations, noise included
        (equation 5.12).
        """
        precision = np.diag(scipy.linalg.cho_solve(self._factor, np.eye(len(self._values))))
        return self._values - self._weights / precision, np.sqrt(1 / precision)

    def gradient(self, points: Array) -> tuple[Array, Array]:
        """Return the expected scores and their gradients (points, size)."""
        covariance, slope, _ = self._matern(_distances(points, self._points))
        products = self._product(points)
        pull = slope * self._weights / self.length_scale**2
        push = 2 * self.quadratic * self._unit * products * self._weights
        slopes = pull @ self._points - pull.sum(axis=1, keepdims=True) * points + push @ self._centred(self._points)
        return (covariance + self.quadratic * products**2) @ self._weights, slopes

    def _covariance(self, points: Array) -> Array:
        """Covariances (points, learnt points)."""
        return self._matern(_distances(points, self._points))[0] + self.quadratic * self._product(points) ** 2

    def _centred(self, points: Array) -> Array:
        return self._unit * (points - 0.5)

    def _product(self, points: Array) -> Array:
        """Its square is, but for constants, the covariance of quadratics whose coefficients have variance 1."""
        return 1 + self._centred(points) @ self._centred(self._points).T

    def _matern(self, distances: Array) -> tuple[Array, Array, Array]:
        """Covariances (equation 4.17), their slope over the squared distance, and the scaled distances."""
        distance = distances / self.length_scale
        decay = self.signal * np.exp(-ROOT5 * distance)
        slope = 5 / 3 * (1 + ROOT5 * distance) * decay
        return (1 + ROOT5 * distance + 5 / 3 * distance**2) * decay, slope, distance

    def loss(self, logs: Array) -> tuple[float, Array]:
        """Return the negative logarithm of the parameters' posterior density and its gradient (equations 2.30, 5.9)."""
        self._logs = logs
        matern, slope, distance = self._matern(self._distances)
        quadratic = self.quadratic * self._products**2
        noisy = matern + quadratic
        noisy[np.diag_indices(len(noisy))] += self.noise + JITTER
        try:
            factor = scipy.linalg.cho_factor(noisy, lower=True)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros_like(logs)
        weights = scipy.linalg.cho_solve(factor, self._values)
        change = scipy.linalg.cho_solve(factor, np.eye(len(noisy))) - np.outer(weights, weights)
        noise = np.exp(logs[2]) * np.trace(change)
        slopes = [(change * by).sum() for by in (slope * distance**2, matern)]
        gradient = 0.5 * np.array([*slopes, noise, (change * quadratic).sum()])
        off = (logs - self._centres) / self._spreads
        loss = 0.5 * (self._values @ weights + off @ off) + np.log(np.diag(factor[0])).sum()
        return float(loss), gradient + off / self._spreads


def _distances(points: Array, others: Array) -> Array:
    return np.asarray(scipy.spatial.distance.cdist(points, others), dtype=np.float64)
