"""Bayesian optimization: a Gaussian process of all scores, and candidates of the highest upper confidence bound."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from threadpoolctl import ThreadpoolController

from llmevo.search.optimizers.base import Asking, CallDigest, ReproducibleOptimizer, Setup
from llmevo.search.optimizers.features import Features, training_set
from llmevo.search.optimizers.matern_process import LEAST_NOISE, MaternProcess, Mean
from llmevo.search.optimizers.population import redraw_choices
from llmevo.search.optimizers.set_cover import covers, used_models
from llmevo.search.space import Array, Genes
from llmevo.search.trial import Suggestion, Trial

FEW = 8  # genes up to which the next constants hold
CONFIDENCE = 0.7  # standard deviations above the expectation; less where every move of many genes is uncertain
CENTRES = 3  # the points of the highest expectation, around which samples are drawn
AROUND = 500  # samples around each
ANYWHERE = 500
RADIUS = 0.15  # the standard deviation of the samples, a share of a gene's range
REDRAWN = 0.1  # the share of choices drawn anew
REFINED, REFINEMENTS = 200, 2  # samples around the best one found, in rounds of half the radius
EXACT = 1e-3  # the noise variance below which scores are next to exact, where they have variance 1
LEAST_NOISE_EXACT = -14.0  # the least logarithm of the noise variance
WIDTH = 0.25  # of a presumed value, a share of a gene's range
FAR, REACH = 100.0, 3.0  # how far below the median a score is very bad, and counts, in distances of the best above it
ADAPTED = 1.05  # the model's parameters are fitted again when there are so many times the trials


@dataclass(frozen=True)
class StandardScale:
    """Scores with mean 0 and variance 1; failures (-inf) share the lowest place."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, scores: Sequence[float], raised: bool = True, error: float = 0.0) -> tuple["StandardScale", Array]:
        """Return the scale and the scaled scores.

        With `raised`, where a score is further below the median than `FAR` times the best one is above it, low ones
        count as at most `REACH` times as far below: a few very bad ones, as an unbounded metric gives them, would make
        all others look alike. The best one counts as above the median by the scores' standard `error` at least.
        """
        finite = [score for score in scores if np.isfinite(score)]
        lowest = min(finite, default=0.0)
        if raised and finite:
            middle = float(np.median(finite))
            above = max(max(finite) - middle, error)
            lowest = middle - REACH * above if above > 0 and lowest < middle - FAR * above else lowest
        filled = np.maximum(scores, lowest)
        scale = cls(float(filled.mean()), max(float(filled.std()), 1e-12))
        return scale, (filled - scale.mean) / scale.deviation

    def score(self, value: float) -> float:
        return self.mean + self.deviation * value


class BayesianOptimization(ReproducibleOptimizer):
    """A Gaussian process of all scores, and one candidate at a time with the highest upper confidence bound (GP-UCB,
    Srinivas et al. 2010, https://arxiv.org/abs/0912.3995) among samples around the points of the highest expectation
    and samples anywhere. Its first candidates are merges of the fewest models that cover the tasks, where not all are
    needed (`set_cover`).

    Use it where there is no LLM, and as the baseline that shows what the LLM adds to `llm`: for 10 to 400 evaluations
    of a model's score. The noise of the scores is learnt, not given: the errors of candidates that answer the same
    questions are mostly the same.
    """

    is_steady = True

    def __init__(self, setup: Setup) -> None:
        self._setup, self._space = setup, setup.space
        self._random = np.random.default_rng(setup.seed)
        self._history = CallDigest(setup.seed, setup.budget, [gene.described() for gene in setup.space.genes])
        self._features = Features(setup.space)
        least_noise = LEAST_NOISE if setup.before_rules_5 else LEAST_NOISE_EXACT
        self._model = MaternProcess(self._features.size, least_noise)
        self._threads = ThreadpoolController()
        self.largest = setup.parallel
        self._trials: list[Trial] = []
        self._covers: list[Suggestion] | None = None
        self._pending: Sequence[Suggestion] = ()
        self._known: set[tuple[float, ...]] = set()
        self._weights: Mapping[str, float] = {}
        self._scale = StandardScale(0.0, 1.0)
        self._adapted = 0
        self._believed = self._presumed = self._centres(setup.presumed)
        if setup.presumed:
            self._history.add("presumed", [*setup.presumed.items()])

    def _centres(self, presumed: Mapping[str, float]) -> tuple[Array, Array] | None:
        """The presumed best value of each gene, and its precision, 0 where nothing is presumed."""
        places = [place for place, gene in enumerate(self._space.genes) if gene.name in presumed]
        if not places:
            return None
        centres = self._space.to_unit(self._space.clamp({**self._space.uniform(), **presumed}))
        precisions = np.zeros(len(centres))
        precisions[places] = 1 / WIDTH**2
        return centres, precisions

    def ask(self, size: int) -> Asking:
        self._history.add("ask", size)
        return self._numeric(self._free(size), self._pending)
        yield  # makes this a generator, as Asking is

    def _free(self, size: int) -> int:
        """One candidate for each worker that has none."""
        return max(1, min(size, self._setup.parallel - len(self._pending)))

    def expect(self, pending: Sequence[Suggestion]) -> None:
        self._history.add("expect", [one.genes for one in pending])
        self._pending = pending

    def tell(self, trials: Sequence[Trial]) -> None:
        self._history.told(trials)
        self._trials += trials
        self._known |= {self._features.model_key(trial.candidate.genes) for trial in trials}

    def retell(self, trials: Sequence[Trial], weights: Mapping[str, float]) -> None:
        self._history.told(trials)
        self._trials, self._weights = [*trials], weights

    def _prior_mean(self) -> Mean | None:
        """The prior mean of the scores: -½ Σ ((x - centre) / width)² / √(believed genes).

        A gene that the chosen method does not have counts as the average over its range, so that what is believed of it
        is for no method and against none.
        """
        if self._believed is None or (self._features.choices and self._setup.before_rules_5):
            return None
        numbers = self._features.numbers
        centres, precisions = (part[numbers] for part in self._believed)
        count = max(1.0, float((precisions > 0).sum()))
        average = 1 / 3 - centres + centres**2  # of (x - centre)² over the unit interval

        def mean(features: Array) -> Array:
            squares = (features[:, : len(numbers)] - centres) ** 2
            if self._features.choices:
                squares = np.where(self._features.numbers_used(features), squares, average)
            return -0.5 * (squares @ precisions) / np.sqrt(count)

        return mean

    def _numeric(self, count: int, pending: Sequence[Suggestion] = ()) -> list[Suggestion]:
        """The next candidates, fewer where no further one makes a new model. Each is chosen as if those before it, and
        the `pending` ones, had scored what is expected of them (the "kriging believer", Ginsbourger et al. 2010).
        """
        chosen = self._untried_covers(pending)[:count]
        with self._threads.limit(limits=1):  # more threads would be slower here, and their number change the digits
            for _ in range(count - len(chosen)):
                others = [*pending, *chosen]
                self._fit(others)
                if (found := self._next(others)) is None:
                    break
                chosen.append(found)
        return chosen

    def _untried_covers(self, pending: Sequence[Suggestion]) -> list[Suggestion]:
        """The merges of few models that cover the tasks, without those whose models were merged before."""
        if self._covers is None and self._trials and not self._setup.before_rules_5:
            self._covers = covers(replace(self._setup.question, trials=[*self._trials, *self.beside]))
        if not self._covers:
            return []
        tried = [*(trial.candidate.genes for trial in self._trials), *(one.genes for one in pending)]
        sets = {used_models(self._space, genes) for genes in tried}
        return [one for one in self._covers if used_models(self._space, one.genes) not in sets]

    def _fit(self, pending: Sequence[Suggestion] = ()) -> None:
        trials = training_set(self._trials)
        if not trials:
            return
        points = self._points([trial.candidate.genes for trial in trials])
        error = float(np.median([trial.score.stderr for trial in trials if trial.score] or [0.0]))
        self._scale, values = StandardScale.of([trial.value for trial in trials], not self._setup.before_rules_4, error)
        mean = self._prior_mean()
        adapt = len(self._trials) >= max(ADAPTED * self._adapted, self._adapted + 1)
        self._model.fit(points, values, mean, adapt)
        self._adapted = len(self._trials) if adapt else self._adapted
        if pending:
            more = self._points([one.genes for one in pending])
            expected = self._model.mean(more)
            self._model.fit(np.vstack([points, more]), np.concatenate([values, expected]), mean, adapt=False)

    def _points(self, genes: Sequence[Genes]) -> Array:
        """The features of points."""
        return self._features.of([self._space.to_unit(one) for one in genes])

    def _next(self, pending: Sequence[Suggestion]) -> Suggestion | None:
        """The new point with the highest upper confidence bound; None where nothing new is left, as in a space of
        choices alone.
        """
        count = len(self._space.genes)
        anywhere = self._random.random((ANYWHERE, count))
        if not self._trials:
            return Suggestion(self._space.from_unit(anywhere[0]), "gaussian")
        known = np.array([self._space.to_unit(trial.candidate.genes) for trial in training_set(self._trials)])
        expected = self._model.mean(self._features.of(known))
        centres = known[np.argsort(-expected, kind="stable")[:CENTRES]]
        samples = np.vstack([*(self._around(centre, AROUND, RADIUS) for centre in centres), anywhere])
        bounds = self._bounds(samples)
        for round_ in range(1, self._refinements + 1):
            best = samples[int(np.argmax(bounds))]
            nearer = self._around(best, REFINED, RADIUS / 2**round_)
            samples, bounds = np.vstack([samples, nearer]), np.concatenate([bounds, self._bounds(nearer)])
        for place in np.argsort(-bounds, kind="stable"):
            genes = self._space.from_unit(samples[place])
            if self._is_new(genes, pending):
                expected = float(f"{self._scale.score(float(self._model.mean(self._points([genes]))[0])):.4g}")
                return Suggestion(genes, "gaussian", f"expected {expected:.4g}", expected=expected)
        return Suggestion(self._space.from_unit(anywhere[0]), "gaussian") if self._setup.before_rules_5 else None

    @property
    def _refinements(self) -> int:
        """Rounds of samples around the best one: more where scores are next to exact and tell near points apart. The
        radius then ends at about `RADIUS` times the standard deviation of the noise.
        """
        noise = self._model.noise
        is_exact = noise < EXACT and not self._setup.before_rules_5
        return int(-np.log2(noise) / 2) if is_exact else REFINEMENTS

    def _bounds(self, samples: Array) -> Array:
        means, deviations = self._model.predict(self._features.of(samples))
        return means + CONFIDENCE * np.sqrt(min(1.0, FEW / samples.shape[1])) * deviations

    def _around(self, centre: Array, count: int, radius: float) -> Array:
        """Normal samples around a point. In spaces of many genes, where moves of all of them would lead far away, half
        of the samples move some of them, as in TuRBO (Eriksson et al. 2019, https://arxiv.org/abs/1910.01739, section
        3.2), and the others all of them a little.
        """
        share = min(1.0, FEW / len(centre))
        steps = radius * self._random.standard_normal((count, len(centre)))
        moved = self._random.random((count, len(centre))) < share
        moved[count // 2 :] = True
        steps[count // 2 :] *= np.sqrt(share)
        points = np.clip(centre + steps * moved, 0.0, 1.0)
        points[:, self._features.choices] = centre[self._features.choices]
        return redraw_choices(points, self._features.choices, REDRAWN, self._random)

    def _is_new(self, genes: Genes, others: Sequence[Suggestion]) -> bool:
        """True if neither a trial nor one of the others makes the same model."""
        return self._features.is_new(genes, self._known, [other.genes for other in others])
