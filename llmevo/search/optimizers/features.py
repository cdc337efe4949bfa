"""What a model of the scores learns from: features of points, the trials, their noise, and scaled scores."""

from collections.abc import Iterable, Sequence, Set

import numpy as np
from numpy.typing import NDArray

from llmevo.search.evidence import rank_normal
from llmevo.search.space import Array, Genes, SearchSpace
from llmevo.search.trial import Trial

UNUSED = 0.5  # the value of a gene that the chosen method does not have, so that it makes no difference
CHOICE = 0.5  # the distance of two choices as a share of a number's range, times √2
MOST = 400  # trials that a model learns from
NOISY = 0.01  # scores are noisy where their errors' variance is more than this share of the scores' variance


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
    standardized: ranks would amplify the noise where scores lie close.
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
