"""The numeric engine: CMA-ES whose samples a Gaussian process ranks before any of them is scored.

So each evaluation does the work of many (Kern, Hansen and Koumoutsakos 2006, "Local meta-models"; Bajer et al. 2019,
"Gaussian process surrogate models for CMA-ES"). It is complete without an LLM.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import ThreadpoolController

from llmevo.search.optimizers.base import Setup
from llmevo.search.optimizers.population import redraw_choices
from llmevo.search.optimizers.surrogate.distribution import Array, Distribution
from llmevo.search.optimizers.surrogate.features import Features
from llmevo.search.optimizers.surrogate.gaussian_process import GaussianProcess, Scale, noise_of
from llmevo.search.space import Genes
from llmevo.search.trial import Suggestion, Trial

FIRST_SIGMA = 0.1
"""A step size of a tenth of a gene's range: the parents and their mean are good, what is far from them is not."""


NOISY_SIGMA = 0.3
"""The first step size where scores are noisy: short steps change them less than chance does."""


NOISY = 0.01
"""Scores are noisy where their errors' variance is more than this share of the start rows' variance."""


POPULATION = 6
"""Candidates a generation: few, so that the model learns often."""


LEAST_TOLD = POPULATION // 2
"""Scored candidates that the distribution learns from at least: those that lead in CMA-ES. They are not kept for long,
since by the next generation it has moved."""


POOL = 40
"""Samples drawn for every candidate scored."""


CLIMBERS, CLIMBS = 6, 15
"""The best samples climb the model that many steps."""


APART, NOISY_APART = 0.3, 1.0
"""Standard deviations a gene, in the root mean square, between two candidates of a generation; where scores are noisy
they are to tell as much of the surroundings as random ones would."""


REDRAWN, EXPLORED = 0.1, 0.5
"""How often a choice is drawn anew, and how often in the one candidate of a generation that explores them."""


LEAST_NOISE = 1e-4
"""The least variance of the scores' noise, where scores have variance 1; the measured one where it is more."""


LEARNT = 120
"""The model learns from the trials nearest the mean: what lies far off says little of where the search is.
Where scores are noisy it learns from all."""


ADAPTED = 1.08
"""The model's parameters are sought again when there are so many times the trials."""


@dataclass(frozen=True)
class Prospect:
    """A point of the pool and what the model expects of it, with scores of variance 1."""

    point: Array
    mean: float
    deviation: float


class Evolution:
    """The distribution, the model and the pool.

    Points are arrays in the unit cube, in the order of the genes. The distribution is over the numbers; a choice is
    the best trial's, now and then drawn anew.
    """

    def __init__(self, setup: Setup) -> None:
        self._space = setup.space
        self._random = np.random.default_rng(setup.seed)
        self._features = Features(setup.space)
        self._model = GaussianProcess(self._features.size)
        self._threads = ThreadpoolController()
        self._trials: list[Trial] = []
        self._points: list[Array] = []
        self._known: set[tuple[float, ...]] = set()
        self._untold: list[tuple[Array, float]] = []
        self._adapted = 0
        self._noisy = False
        self._scale: Scale | None = None
        self.distribution: Distribution | None = None
        self._seed = int(self._random.integers(2**31))

    @property
    def trials(self) -> Sequence[Trial]:
        return self._trials

    @property
    def sigma(self) -> float:
        return self.distribution.sigma if self.distribution else FIRST_SIGMA

    @property
    def best(self) -> Trial | None:
        """The trial with the highest score; where scores are noisy, the one that the model expects most of."""
        scored = [place for place, trial in enumerate(self._trials) if trial.score]
        values = [self._trials[place].value for place in scored]
        if self._noisy and scored:
            with self._threads.limit(limits=1):
                values = self._expected(np.array([self._points[place] for place in scored]))
        return self._trials[scored[int(np.argmax(values))]] if scored else None

    def _middle(self) -> Array:
        """The best point; the uniform merge's where nothing has a score."""
        best = self.best
        return self._space.to_unit(best.candidate.genes if best else self._space.uniform())

    def tell(self, trials: Sequence[Trial]) -> None:
        """What everything was worth that was scored; only what is also in `learn` moves the distribution."""
        for trial in trials:
            self._trials.append(trial)
            self._points.append(self._space.to_unit(trial.candidate.genes))
            self._known.add(self._features.essence(trial.candidate.genes))

    def retell(self, trials: Sequence[Trial]) -> None:
        """The same trials with other values."""
        self._trials = [*trials]

    def move(self) -> None:
        """Go on from the best trial: under another emphasis on several aims it lies elsewhere on the front, further
        than the distribution would walk in a generation.
        """
        if self.distribution:
            self.distribution.mean = self._numbers(self._middle())

    def learn(self, trials: Sequence[Trial]) -> None:
        """Move the distribution by scored trials, once there are enough."""
        if self.distribution is None:
            return
        points = np.array([self._space.to_unit(trial.candidate.genes) for trial in trials])
        values = np.array([trial.value for trial in trials])
        if self._noisy and len(trials):  # what the model makes of a score and its neighbours' is nearer the truth
            with self._threads.limit(limits=1):
                self._fit()
                values = self._expected(points)
        self._untold += [(self._numbers(point), -float(value)) for point, value in zip(points, values, strict=True)]
        if len(self._untold) >= LEAST_TOLD:
            with self._threads.limit(limits=1):
                self.distribution.tell(*zip(*self._untold, strict=True))
            self._untold = []

    def _numbers(self, point: Array) -> Array:
        """Of a point what the distribution is over: never nothing."""
        numbers = point[self._features.numbers]
        return numbers if len(numbers) else np.array([0.5])

    def pool(self) -> list[Prospect]:
        """New points, those of the highest expected score first."""
        if self.distribution is None:
            start = self._numbers(self._middle())
            self._noisy = noise_of(self._trials) > NOISY
            sigma = NOISY_SIGMA if self._noisy else FIRST_SIGMA
            self.distribution = Distribution(start, sigma, POPULATION, self._seed)
        with self._threads.limit(limits=1):  # more threads would be slower here, and their number change the digits
            self._fit()
            drawn = self._drawn(POOL * self.distribution.population)
            ranked = drawn[np.argsort(-self._expected(drawn), kind="stable")]
            climbed = self._climb(np.vstack([ranked[: CLIMBERS - 1], self._whole(self.distribution.mean[None])]))
            prospects = self.prospects(np.vstack([climbed, ranked]))
        if self._features.choices:
            prospects.insert(1, self._explorer(drawn[0]))
        return prospects

    def _explorer(self, point: Array) -> Prospect:
        """The second of a generation, where there are choices: the model would never try those it has not seen."""
        return self.prospects(redraw_choices(point[None], self._features.choices, EXPLORED, self._random))[0]

    def _fit(self) -> None:
        """Learn from the trials nearest the mean, and the best."""
        if not self._trials:
            return
        assert self.distribution is not None
        values = np.array([trial.value for trial in self._trials])
        far = self.distribution.distances(np.array([self._numbers(p) for p in self._points]), self.distribution.mean)
        nearest = np.union1d(np.argsort(far, kind="stable")[: None if self._noisy else LEARNT], np.argmax(values))
        floor = noise_of([self._trials[place] for place in nearest])
        points = self._features.of([self._points[place] for place in nearest])
        adapt = len(values) >= ADAPTED * self._adapted
        self._adapted = len(values) if adapt else self._adapted
        self._scale = Scale(values[nearest].tolist(), self._noisy)
        self._model.fit(points, self._scale.values, max(LEAST_NOISE, floor), adapt)

    def _drawn(self, size: int) -> Array:
        """Samples of the distribution; what would leave the unit cube is reflected, so that none pile up there."""
        assert self.distribution is not None
        steps = self._random.standard_normal((size, len(self.distribution.mean))) @ self.distribution.axes.T
        points = self._whole(_reflected(self.distribution.mean + self.distribution.sigma * steps))
        return redraw_choices(points, self._features.choices, REDRAWN, self._random)

    def _whole(self, numbers: Array) -> Array:
        """Points with these numbers and the best trial's choices."""
        points = np.tile(self._middle(), (len(numbers), 1))
        points[:, self._features.numbers] = numbers[:, : len(self._features.numbers)]
        return points

    def _expected(self, points: Array) -> Array:
        return self._model.mean(self._features.of(points)) if self._trials else np.zeros(len(points))

    def prospects(self, points: Array) -> list[Prospect]:
        """Points and what the model expects of them, the highest first."""
        means, deviations = self.predicted(points)
        order = np.argsort(-means, kind="stable")
        return [Prospect(points[place], float(means[place]), float(deviations[place])) for place in order]

    def predicted(self, points: Sequence[Array] | Array) -> tuple[Array, Array]:
        """What the model expects of points, where scores have variance 1, and the standard deviations of that."""
        if not self._trials:
            return np.zeros(len(points)), np.ones(len(points))
        with self._threads.limit(limits=1):
            return self._model.predict(self._features.of(points))

    def _climb(self, points: Array) -> Array:
        """Gradient steps up the model, no further from the mean than samples are."""
        if not self._trials or not self._features.numbers:
            return points
        assert self.distribution is not None
        mean, axes, sigma = self.distribution.mean, self.distribution.axes, self.distribution.sigma
        inverse, count = np.linalg.inv(axes), len(mean)
        radius = np.sqrt(count) * sigma
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

    def choose(self, prospects: Sequence[Prospect], size: int) -> list[Suggestion]:
        """The first prospects that are new and lie apart from one another, as candidates."""
        chosen: list[Suggestion] = []
        taken: list[Array] = []
        for near in (False, True):  # rather too near than none
            for prospect in prospects:
                if len(chosen) == size:
                    return chosen
                if near or self.apart(prospect.point, taken, NOISY_APART if self._noisy else APART):
                    genes = self._space.from_unit(prospect.point)
                    if self.is_new(genes, chosen):
                        taken.append(prospect.point)
                        expected = f"{self.as_score(prospect.mean):.4g}"  # the last digits are the processor's
                        chosen.append(Suggestion(genes, "gaussian", f"expected {expected}", expected=float(expected)))
        return chosen

    def is_new(self, genes: Genes, others: Sequence[Suggestion]) -> bool:
        """Whether neither a trial nor one of the others makes the same model."""
        essence = self._features.essence(genes)
        return essence not in self._known and all(essence != self._features.essence(other.genes) for other in others)

    def differs(self, point: Array, others: Sequence[Array]) -> bool:
        """Whether a point is apart from those of the others that have its choices."""
        chosen = self._features.chosen(point)
        return self.apart(point, [other for other in others if self._features.chosen(other) == chosen])

    def apart(self, point: Array, others: Sequence[Array], least: float = APART) -> bool:
        """Whether a point is so many standard deviations a gene from others, in the root mean square."""
        assert self.distribution is not None
        if not others:
            return True
        numbers = np.array([self._numbers(other) for other in others])
        nearest = self.distribution.distances(numbers, self._numbers(point)).min()
        return bool(nearest >= least * np.sqrt(numbers.shape[1]))

    def as_score(self, value: float) -> float:
        """What the model expects, as a score of the tasks."""
        return self._scale.score(value) if self._scale else 0.0


def _reflected(points: Array) -> Array:
    return np.clip(1.0 - np.abs(1.0 - np.abs(points)), 0.0, 1.0)
