"""What the scores so far say of points not yet scored: a Gaussian process."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy  # its parts are opened when they are used
from numpy.typing import NDArray

from llmevo.search.evidence import rank_normal
from llmevo.search.trial import Trial

Array = NDArray[np.float64]


def noise_of(trials: Sequence[Trial]) -> float:
    """The variance of the scores' errors as a share of the scores' variance, one at most."""
    scores = [trial.score for trial in trials if trial.score]
    error = float(np.median([score.stderr for score in scores])) if scores else 0.0
    spread = float(np.std([score.total for score in scores])) if scores else 0.0
    return min(1.0, (error / spread) ** 2) if spread else float(error > 0)


class Scale:
    """From scores to what a Gaussian process learns.

    Exact scores become the normal quantiles of their ranks, so that outliers lose their weight. Noisy ones are only
    moved and divided by their standard deviation: ranks would make more of the noise where scores lie close.
    Failures (-inf) share the lowest place.
    """

    def __init__(self, scores: Sequence[float], noisy: bool) -> None:
        finite = [score for score in scores if np.isfinite(score)]
        self._scores = np.maximum(scores, min(finite, default=0.0))
        self.values: Array = _standardised(self._scores) if noisy else rank_normal(scores)
        """The scores, in the order given."""

    def score(self, value: float) -> float:
        """The score at a value; beyond those seen the lowest or highest."""
        return float(np.interp(value, np.sort(self.values), np.sort(self._scores)))


def _standardised(scores: Array) -> Array:
    return (scores - scores.mean()) / max(float(scores.std()), 1e-12)


Array = NDArray[np.float64]


ROOT5 = np.sqrt(5.0)


JITTER = 1e-8


LENGTH_SPREAD = 1.0
"""Standard deviation of the length scale's logarithm, before any score is seen."""


SIGNAL_CENTRE = -1.0
"""Of the logarithm of the variance of what departs from the quadratic, where scores have variance 1."""


NOISE_CENTRE, NOISE_SPREAD = np.log(1e-2), 1.5
"""Of the noise variance's logarithm, where scores have variance 1."""


BOUNDS = ((-4.0, 5.0), (-6.0, 4.0), (-10.0, 1.0), (-12.0, 4.0))
"""Of the logarithms of length scale, signal variance, noise variance and the quadratic's variance."""


STEPS = 6
"""Quasi-Newton steps each time; every fit goes on from the one before."""


class GaussianProcess:
    """A quadratic of all features, and what departs from it: Matérn-5/2 with one length scale for all.

    Near their best, surfaces are much alike a quadratic, and of all features together it is learnt from far fewer
    scores than distances are (Rasmussen and Williams 2006, section 2.7; local quadratics in CMA-ES: Kern et al.
    2006). A length scale for each feature is learnt wrong from a hundred scores: regret was 1.3 to 1.8 times as high
    on half of BBOB. The prior of the length scale grows with the root of the number of features, as distances do
    (Hvarfner et al., https://arxiv.org/abs/2402.02229). The parameters are those of the highest posterior density,
    by gradient, each fit going on from the one before; scikit-learn's process has neither priors nor the mean's
    gradient, which is climbed. The predictions are tested against scikit-learn's.
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
        """In the features' own units."""
        return float(np.exp(self._logs[0]))

    @property
    def signal(self) -> float:
        """Variance of what departs from the quadratic."""
        return float(np.exp(self._logs[1]))

    @property
    def noise(self) -> float:
        """Variance of what the features do not explain."""
        return float(np.exp(self._logs[2])) + self._floor

    @property
    def quadratic(self) -> float:
        """Variance of the quadratic's coefficients."""
        return float(np.exp(self._logs[3]))

    def fit(self, points: Array, values: Array, floor: float = 0.0, adapt: bool = True) -> None:
        """Learn from points and their standardised scores.

        `floor` is the least variance that the noise may have. Without `adapt` the parameters stay as they are.
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
        """The expected scores."""
        return self._covariance(points) @ self._weights

    def predict(self, points: Array) -> tuple[Array, Array]:
        """The expected scores and their standard deviations, without the noise of scoring."""
        covariance = self._covariance(points)
        reduced = scipy.linalg.solve_triangular(self._factor[0], covariance.T, lower=True)
        before = self.signal + self.quadratic * (1 + (self._centred(points) ** 2).sum(axis=1)) ** 2
        return covariance @ self._weights, np.sqrt(np.maximum(before - (reduced**2).sum(axis=0), 0.0))

    def left_out(self) -> tuple[Array, Array]:
        """What all others say of each point it has learnt from, noise included, and the standard deviation of that
        (Rasmussen and Williams 2006, section 5.4.2).
        """
        precision = np.diag(scipy.linalg.cho_solve(self._factor, np.eye(len(self._values))))
        return self._values - self._weights / precision, np.sqrt(1 / precision)

    def gradient(self, points: Array) -> tuple[Array, Array]:
        """The expected scores and how they change along each feature."""
        covariance, slope, _ = self._matern(_distances(points, self._points))
        products = self._product(points)
        pull = slope * self._weights / self.length_scale**2
        push = 2 * self.quadratic * self._unit * products * self._weights
        slopes = pull @ self._points - pull.sum(axis=1, keepdims=True) * points + push @ self._centred(self._points)
        return (covariance + self.quadratic * products**2) @ self._weights, slopes

    def _covariance(self, points: Array) -> Array:
        """Of points with those learnt from."""
        matern, _, _ = self._matern(_distances(points, self._points))
        return matern + self.quadratic * self._product(points) ** 2

    def _centred(self, points: Array) -> Array:
        return self._unit * (points - 0.5)

    def _product(self, points: Array) -> Array:
        """Its square is the covariance of quadratics whose coefficients all have variance one, but for constants."""
        return 1 + self._centred(points) @ self._centred(self._points).T

    def _matern(self, distances: Array) -> tuple[Array, Array, Array]:
        """Covariances at some distances, their slope over the squared distance, and the scaled distances."""
        distance = distances / self.length_scale
        decay = self.signal * np.exp(-ROOT5 * distance)
        slope = 5 / 3 * (1 + ROOT5 * distance) * decay
        return (1 + ROOT5 * distance + 5 / 3 * distance**2) * decay, slope, distance

    def loss(self, logs: Array) -> tuple[float, Array]:
        """The negative logarithm of the posterior density of the parameters, and its gradient."""
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
