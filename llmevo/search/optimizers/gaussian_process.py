"""A Gaussian process of the scores: features of points, scaled scores, and the model that joins them."""

from collections.abc import Iterable, Sequence, Set
from typing import Any

import numpy as np
import scipy  # its parts are loaded at their first use
from numpy.typing import NDArray

from llmevo.search.evidence import rank_normal
from llmevo.search.space import Array, Genes, SearchSpace
from llmevo.search.trial import Trial

UNUSED = 0.5  # the value of a gene that the chosen method does not have, so that it makes no difference
CHOICE = 0.5  # the distance of two choices as a share of a number's range, times √2

ROOT5 = np.sqrt(5.0)
JITTER = 1e-8
LENGTH_SPREAD = 1.0  # the prior's standard deviation of the logarithm of the length scale
SIGNAL_CENTRE = -1.0  # the prior's mean of the logarithm of the signal variance, where scores have variance 1
NOISE_CENTRE, NOISE_SPREAD = np.log(1e-2), 1.5  # the prior of the logarithm of the noise variance
BOUNDS = ((-4.0, 5.0), (-6.0, 4.0), (-10.0, 1.0), (-12.0, 4.0))  # of the logarithms of the four parameters
MOST = 400  # trials that a model learns from
STEPS = 6  # quasi-Newton steps of a fit; each fit starts at the parameters of the one before


class Features:
    """The inputs of the model: first the numeric genes in their order, then 0 or `CHOICE` for each choice of a gene."""

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self.numbers = [place for place, gene in enumerate(space.genes) if not gene.choices]
        self.choices = [place for place, gene in enumerate(space.genes) if gene.choices]
        self.size = len(self.numbers) + sum(len(space.genes[place].choices) for place in self.choices)
        self._used: dict[tuple[float, ...], NDArray[np.bool_]] = {}

    def used(self, genes: Genes) -> NDArray[np.bool_]:
        """Return which genes the recipe depends on; cached for every combination of choices."""
        if not self.choices:
            return np.ones(len(self._space.genes), dtype=bool)
        chosen = tuple(genes[self._space.genes[place].name] for place in self.choices)
        if chosen not in self._used:
            self._used[chosen] = self._space.active(genes)
        return self._used[chosen]

    def model_key(self, genes: Genes) -> tuple[float, ...]:
        """Return a key that is equal for candidates that make the same model."""
        values = np.array([genes[gene.name] for gene in self._space.genes])
        return tuple(np.where(self.used(genes), values, UNUSED).tolist())

    def is_new(self, genes: Genes, known: Set[tuple[float, ...]], others: Iterable[Genes]) -> bool:
        """Return whether no candidate with one of the `known` keys, and none of the others, makes the same model."""
        own = self.model_key(genes)
        return own not in known and all(own != self.model_key(other) for other in others)

    def of(self, points: Sequence[Array] | Array) -> Array:
        """Return the features (points, size) of points of the unit cube."""
        cube = np.asarray(points, dtype=np.float64).reshape(-1, len(self._space.genes))
        if not self.choices:
            return cube
        chosen = np.column_stack([self._chosen(cube[:, place], place) for place in self.choices])
        combinations, of = np.unique(chosen, axis=0, return_inverse=True)
        first = [int(np.argmax(of == place)) for place in range(len(combinations))]
        used = np.array([self.used(self._space.from_unit(cube[place])) for place in first])
        numbers = np.where(used[of], cube, UNUSED)[:, self.numbers]
        kinds = [
            CHOICE * np.eye(len(self._space.genes[place].choices))[column]
            for place, column in zip(self.choices, chosen.T, strict=True)
        ]
        return np.hstack([numbers, *kinds])

    def numbers_used(self, features: Array) -> NDArray[np.bool_]:
        """Return which numeric genes each row of features depends on (rows, numeric genes), in a space with choices."""
        kinds, first = [], len(self.numbers)
        for place in self.choices:
            count = len(self._space.genes[place].choices)
            kinds.append(features[:, first : first + count].argmax(axis=1))
            first += count
        names = [self._space.genes[place].name for place in self.choices]
        others = {gene.name: gene.low for gene in self._space.genes}
        combinations, of = np.unique(np.column_stack(kinds), axis=0, return_inverse=True)
        used = [self.used(others | dict(zip(names, map(float, chosen), strict=True))) for chosen in combinations]
        return np.array(used)[of][:, self.numbers]

    def chosen(self, point: Array) -> tuple[int, ...]:
        """Return the choices of a point of the unit cube."""
        return tuple(int(self._chosen(point[place : place + 1], place)[0]) for place in self.choices)

    def _chosen(self, column: Array, place: int) -> NDArray[np.int64]:
        """The choices at places in the unit interval, as in `Gene.from_unit`."""
        count = len(self._space.genes[place].choices)
        return np.clip(np.floor(column * count), 0, count - 1).astype(np.int64)


def noise_of(trials: Sequence[Trial]) -> float:
    """Return the variance of the scores' errors as a share of the scores' variance, 1 at most."""
    scores = [trial.score for trial in trials if trial.score]
    error = float(np.median([score.stderr for score in scores])) if scores else 0.0
    spread = float(np.std([score.total for score in scores])) if scores else 0.0
    return min(1.0, (error / spread) ** 2) if spread else float(error > 0)


def training_set(trials: Sequence[Trial]) -> Sequence[Trial]:
    """Return the trials that a model learns from, at most `MOST`: the highest scores and, of the rest, the latest."""
    if len(trials) <= MOST:
        return trials
    best = sorted(trials, key=lambda trial: trial.value, reverse=True)[: MOST // 2]
    taken = {trial.candidate.id for trial in best}
    rest = [trial for trial in trials if trial.candidate.id not in taken]
    return [*best, *rest[-(MOST - len(best)) :]]


class Scale:
    """Scores, scaled for a Gaussian process; failures (-inf) share the lowest place.

    Exact scores become the normal quantiles of their ranks, so that outliers lose their weight. Noisy ones are
    standardised: ranks would amplify the noise where scores lie close.
    """

    def __init__(self, scores: Sequence[float], noisy: bool) -> None:
        finite = [score for score in scores if np.isfinite(score)]
        self._scores = np.maximum(scores, min(finite, default=0.0))
        self.values: Array = self._scores if noisy else rank_normal(scores)
        """The scaled scores, in the order given."""
        if noisy:
            self.values = (self._scores - self._scores.mean()) / max(float(self._scores.std()), 1e-12)

    def score(self, value: float) -> float:
        """Return the score at a scaled value; outside the known range the lowest or highest."""
        return float(np.interp(value, np.sort(self.values), np.sort(self._scores)))


class GaussianProcess:
    """A Gaussian process: a quadratic of all features plus a Matérn-5/2 term with one length scale.

    Near its optimum a surface is nearly quadratic, and a quadratic is learnt from few scores (Rasmussen and Williams
    2006, "Gaussian Processes for Machine Learning", section 2.7; local quadratics in CMA-ES: Kern et al. 2006). A
    length scale for each feature cannot be learnt from a hundred scores: regret was 1.3 to 1.8 times as high on half of
    BBOB. The prior of the length scale grows with the root of the number of features, as distances do (Hvarfner et al.,
    https://arxiv.org/abs/2402.02229). The parameters maximise the posterior density; each fit starts at those of the
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
