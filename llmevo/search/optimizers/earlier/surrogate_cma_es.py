"""CMA-ES whose samples a Gaussian process ranks before any of them is scored.

So each evaluation does the work of many (Kern, Hansen and Koumoutsakos 2006, "Local meta-models"; Bajer et al. 2019,
"Gaussian process surrogate models for CMA-ES").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from llmevo.search.optimizers.base import Asking, CallDigest, ReproducibleOptimizer, Setup
from llmevo.search.optimizers.earlier.gaussian_process import GaussianProcess
from llmevo.search.optimizers.features import NOISY, Features, Scale, noise_of
from llmevo.search.optimizers.population import redraw_choices
from llmevo.search.space import Array, Genes
from llmevo.search.trial import Suggestion, Trial

FIRST_SIGMA = 0.1  # a share of a gene's range: the parents and their mean are good, points far from them are not
NOISY_SIGMA = 0.3  # the first step size where scores are noisy: noise hides the effect of short steps
SMALLEST, LARGEST = 1e-3, 0.5  # bounds of the step size
LEAST_NOISE = 1e-4  # the least variance of the noise, where scores have variance 1
POPULATION = 6  # candidates a generation: few, so that the model learns often
LEAST_TOLD = POPULATION // 2  # scored candidates that the distribution learns from at least: the parents μ of CMA-ES
POOL = 40  # samples drawn for every candidate scored
CLIMBERS, CLIMBS = 6, 15  # the best samples climb the model for so many steps
APART, NOISY_APART = 0.3, 1.0  # the least distance of a generation's candidates: root mean square of deviations a gene
REDRAWN, EXPLORED = 0.1, 0.5  # the share of choices drawn anew, and in the one candidate that explores them
LEARNT = 120  # exact scores: the model learns from so many trials nearest the mean; noisy scores: from all
ADAPTED = 1.08  # the model's parameters are fitted again when there are so many times the trials


@dataclass(frozen=True)
class Prospect:
    """A point of the pool and its predicted value, where scores have variance 1."""

    point: Array
    mean: float
    deviation: float


class Distribution:
    """N(mean, sigma² · covariance) over the unit cube, updated by the library `cmaes`.

    The only place that reads the library's internals. `axes` are the covariance's symmetric root, so that
    `mean + sigma * axes @ z` is a sample for a standard normal z (https://arxiv.org/abs/1604.00772, equation 5).
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
        """The step size as a share of a gene's range."""
        return float(self._strategy._sigma)

    @property
    def axes(self) -> Array:
        vectors, lengths = self._strategy._eigen_decomposition()
        return (vectors * lengths) @ vectors.T  # equal on every processor, though the signs of eigenvectors are not

    def distances(self, points: Array, other: Array) -> Array:
        """Return the distances of points from another, in standard deviations."""
        vectors, lengths = self._strategy._eigen_decomposition()
        return np.linalg.norm((points - other) @ vectors / lengths, axis=-1) / self.sigma

    def tell(self, points: Sequence[Array], costs: Sequence[float]) -> None:
        """Learn from the costs, to be minimized, of a population or a part of it.

        Points further off than a sample would be are moved towards the mean first (Hansen 2011, "Injecting external
        solutions into CMA-ES", https://arxiv.org/abs/1110.4181, equation 4). The mean itself, as the worst point, takes
        the places of missing ones: a step of length 0 moves nothing.
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
        self._strategy._sigma = min(max(self.sigma, SMALLEST), LARGEST)


class SurrogateCmaEs(ReproducibleOptimizer):
    """CMA-ES whose samples a Gaussian process ranks first.

    Only for logs with `rules` below 3, where `llm-off` is this optimizer. Measured for 50 to 200
    evaluations of 10 to 40 genes.
    """

    # Points are arrays in the unit cube, in the order of the genes. The distribution is over the numeric genes; choices
    # are the best trial's, sometimes drawn anew.

    def __init__(self, setup: Setup) -> None:
        self._setup, self._space = setup, setup.space
        self._random = np.random.default_rng(setup.seed)
        self._seed = int(self._random.integers(2**31))
        self._other_random = np.random.default_rng([setup.seed, 1])
        genes = [gene.described() for gene in setup.space.genes]
        self._history = CallDigest(setup.seed, setup.budget, setup.sigma_rule, genes)
        self._features = Features(setup.space)
        self._model = GaussianProcess(self._features.size)
        self._threads = ThreadpoolController()
        self._trials: list[Trial] = []
        self._points: list[Array] = []
        self._known: set[tuple[float, ...]] = set()
        self._untold: list[tuple[Array, float]] = []
        self._adapted = 0
        self._noisy = self._begun = False
        self._scale: Scale | None = None
        self._distribution: Distribution | None = None
        self._weights: Mapping[str, float] = {}

    @property
    def sigma(self) -> float:
        """The step size as a share of a gene's range."""
        return self._distribution.sigma if self._distribution else FIRST_SIGMA

    def ask(self, size: int) -> Asking:
        self._history.add("ask", size)
        return self._choose(self._pool(), min(size, POPULATION))
        yield  # makes this a generator, as Asking is

    def tell(self, trials: Sequence[Trial]) -> None:
        self._history.told(trials)
        for trial in trials:
            self._trials.append(trial)
            self._points.append(self._space.to_unit(trial.candidate.genes))
            self._known.add(self._features.model_key(trial.candidate.genes))
        if self._begun:  # the start rows are samples of no distribution
            self._learn([trial for trial in trials if trial.score and self._may_lead(trial)])
        self._begun = True

    def retell(self, trials: Sequence[Trial], weights: Mapping[str, float]) -> None:
        """Replace the values of all trials. With new weights the search goes on from the best trial by these: it may
        lie further off on the front than the distribution moves in a generation.
        """
        self._history.told(trials)
        self._trials = [*trials]
        if weights != self._weights and self._distribution:
            self._distribution.mean = self._numbers(self._middle())
        self._weights = weights

    def _may_lead(self, trial: Trial) -> bool:
        """True if the distribution learns from a scored trial."""
        return True

    def recommend(self) -> Trial | None:
        """Return the trial with the highest score; where scores are noisy, the one with the highest expectation."""
        scored = [place for place, trial in enumerate(self._trials) if trial.score]
        values = [self._trials[place].value for place in scored]
        if self._noisy and scored:
            with self._threads.limit(limits=1):
                values = self._expected(np.array([self._points[place] for place in scored]))
        return self._trials[scored[int(np.argmax(values))]] if scored else None

    def _middle(self) -> Array:
        """The best point; the uniform merge where no trial has a score."""
        best = self.recommend()
        return self._space.to_unit(best.candidate.genes if best else self._space.uniform())

    def _numbers(self, point: Array) -> Array:
        """The numeric genes of a point, which the distribution is over; one constant where there are none."""
        numbers = point[self._features.numbers]
        return numbers if len(numbers) else np.array([0.5])

    def _learn(self, trials: Sequence[Trial]) -> None:
        """Move the distribution by scored trials, once there are enough."""
        if self._distribution is None:
            return
        points = np.array([self._space.to_unit(trial.candidate.genes) for trial in trials])
        values = np.array([trial.value for trial in trials])
        with self._threads.limit(limits=1):
            if self._noisy and len(trials):  # the posterior mean is nearer the truth than a single score
                self._fit()
                values = self._expected(points)
            self._untold += [(self._numbers(point), -float(value)) for point, value in zip(points, values, strict=True)]
            if len(self._untold) >= LEAST_TOLD:
                self._distribution.tell(*zip(*self._untold, strict=True))
                self._untold = []

    def _pool(self) -> list[Prospect]:
        """New points, those of the highest expected score first."""
        if self._distribution is None:
            start = self._numbers(self._middle())
            self._noisy = noise_of(self._trials) > NOISY
            sigma = NOISY_SIGMA if self._noisy else FIRST_SIGMA
            self._distribution = Distribution(start, sigma, POPULATION, self._seed)
        with self._threads.limit(limits=1):  # more threads would be slower here, and their number change the digits
            self._fit()
            drawn = self._drawn(self._distribution, POOL * POPULATION)
            ranked = drawn[np.argsort(-self._expected(drawn), kind="stable")]
            mean = self._whole(self._distribution.mean[None])
            climbed = self._climb(self._distribution, np.vstack([ranked[: CLIMBERS - 1], mean]))
            prospects = self._prospects(np.vstack([climbed, ranked]))
        if self._features.choices:  # the second one explores: the model expects nothing of choices without a score
            explorer = redraw_choices(drawn[:1], self._features.choices, EXPLORED, self._random)
            prospects[1:1] = self._prospects(explorer)
        return prospects

    def _fit(self) -> None:
        """Learn from the trials nearest the mean, and the best."""
        if not self._trials:
            return
        assert self._distribution is not None
        values = np.array([trial.value for trial in self._trials])
        numbers = np.array([self._numbers(point) for point in self._points])
        far = self._distribution.distances(numbers, self._distribution.mean)
        nearest = np.union1d(np.argsort(far, kind="stable")[: None if self._noisy else LEARNT], np.argmax(values))
        floor = noise_of([self._trials[place] for place in nearest])
        points = self._features.of([self._points[place] for place in nearest])
        adapt = len(values) >= ADAPTED * self._adapted
        self._adapted = len(values) if adapt else self._adapted
        self._scale = Scale(values[nearest].tolist(), self._noisy)
        self._model.fit(points, self._scale.values, max(LEAST_NOISE, floor), adapt)

    def _drawn(self, distribution: Distribution, size: int) -> Array:
        """Samples of the distribution; points outside the unit cube are reflected, lest they pile up."""
        steps = self._random.standard_normal((size, len(distribution.mean))) @ distribution.axes.T
        numbers = np.clip(1.0 - np.abs(1.0 - np.abs(distribution.mean + distribution.sigma * steps)), 0.0, 1.0)
        return redraw_choices(self._whole(numbers), self._features.choices, REDRAWN, self._random)

    def _whole(self, numbers: Array) -> Array:
        """Points with these numbers and the best trial's choices."""
        points = np.tile(self._middle(), (len(numbers), 1))
        points[:, self._features.numbers] = numbers[:, : len(self._features.numbers)]
        return points

    def _expected(self, points: Array) -> Array:
        return self._model.mean(self._features.of(points)) if self._trials else np.zeros(len(points))

    def _prospects(self, points: Array) -> list[Prospect]:
        """The points with their predictions, the highest first."""
        means, deviations = self._predicted(points)
        order = np.argsort(-means, kind="stable")
        return [Prospect(points[place], float(means[place]), float(deviations[place])) for place in order]

    def _predicted(self, points: Sequence[Array] | Array) -> tuple[Array, Array]:
        """The expectations of points, where scores have variance 1, and their standard deviations."""
        if not self._trials:
            return np.zeros(len(points)), np.ones(len(points))
        with self._threads.limit(limits=1):
            return self._model.predict(self._features.of(points))

    def _climb(self, distribution: Distribution, points: Array) -> Array:
        """Gradient steps up the model, no further from the mean than samples are."""
        if not self._trials or not self._features.numbers:
            return points
        mean, axes = distribution.mean, distribution.axes
        inverse, count = np.linalg.inv(axes), len(mean)
        radius = np.sqrt(count) * distribution.sigma
        lengths = np.full(len(points), radius / 4)
        heights, slopes = self._model.gradient(self._features.of(points))
        for _ in range(CLIMBS):
            steps = slopes[:, :count] @ axes
            steps /= np.maximum(np.linalg.norm(steps, axis=1, keepdims=True), 1e-12)
            moved = points[:, self._features.numbers] + lengths[:, None] * steps @ axes.T
            offsets = (moved - mean) @ inverse.T
            far = np.maximum(np.linalg.norm(offsets, axis=1, keepdims=True) / radius, 1.0)
            there = points.copy()
            there[:, self._features.numbers] = np.clip(mean + (offsets / far) @ axes.T, 0.0, 1.0)
            found, new_slopes = self._model.gradient(self._features.of(there))
            higher = found > heights
            points = np.where(higher[:, None], there, points)
            slopes = np.where(higher[:, None], new_slopes, slopes)
            heights = np.where(higher, found, heights)
            lengths *= np.where(higher, 1.2, 0.5)
        return points

    def _choose(self, prospects: Sequence[Prospect], size: int) -> list[Suggestion]:
        """The first prospects that are new and lie apart from one another, as candidates: at least one."""
        chosen: list[Suggestion] = []
        taken: list[Array] = []
        for near in (False, True):  # rather too near than none
            for prospect in prospects:
                if len(chosen) == size:
                    return chosen
                if near or self._apart(prospect.point, taken, NOISY_APART if self._noisy else APART):
                    genes = self._space.from_unit(prospect.point)
                    if self._is_new(genes, chosen):
                        taken.append(prospect.point)
                        expected = f"{self._as_score(prospect.mean):.4g}"  # the last digits are the processor's
                        chosen.append(Suggestion(genes, "gaussian", f"expected {expected}", expected=float(expected)))
        if not chosen:  # nothing new is left near by
            point = self._other_random.random(len(self._space.genes))
            chosen = [Suggestion(self._space.from_unit(point), "gaussian")]
        return chosen

    def _is_new(self, genes: Genes, others: Sequence[Suggestion]) -> bool:
        """True if neither a trial nor one of the others makes the same model."""
        return self._features.is_new(genes, self._known, [other.genes for other in others])

    def _apart(self, point: Array, others: Sequence[Array], least: float = APART) -> bool:
        """True if a point is so many standard deviations a gene from others, in the root mean square."""
        assert self._distribution is not None
        if not others:
            return True
        numbers = np.array([self._numbers(other) for other in others])
        nearest = self._distribution.distances(numbers, self._numbers(point)).min()
        return bool(nearest >= least * np.sqrt(numbers.shape[1]))

    def _as_score(self, value: float) -> float:
        """An expectation as a score of the tasks."""
        return self._scale.score(value) if self._scale else 0.0
