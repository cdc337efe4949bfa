"""The base of optimizers that learn from whole populations of points in the unit cube."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from llmevo.search.optimizers.base import Asking, CallDigest, Optimizer, Setup, genes_key
from llmevo.search.space import Array
from llmevo.search.trial import Suggestion, Trial


def redraw_choices(points: Array, choices: Sequence[int], rate: float, random: np.random.Generator) -> Array:
    """Return the points (one a row) with some of these genes drawn anew at a rate: choices have no order."""
    redrawn = points.copy()
    for place in choices:
        anew = random.random(len(points)) < rate
        redrawn[anew, place] = random.random(int(anew.sum()))
    return redrawn


def at_least_two(numbers: Array) -> Array:
    """Return the numbers with a constant second one if there is one only: libraries need two dimensions."""
    return np.concatenate([numbers, np.full(max(0, 2 - len(numbers)), 0.5)])


class PopulationSearch(Optimizer):
    """The base of optimizers with populations: these are asked for in parts of any size, and learnt from when complete.

    The subclass searches the numeric genes; choices are the best trial's, drawn anew with probability `REDRAW`. A point
    that failed or was never told has the cost infinity.
    """

    REDRAW = 0.1
    origin: str
    """The name of the optimizer in the log."""
    starts_uniform = False
    """True if it starts from the uniform merge instead of from the best start row."""

    def __init__(self, setup: Setup) -> None:
        self._space = setup.space
        self._budget = setup.budget
        self._parallel, self._population = setup.parallel, setup.population
        self._random = np.random.default_rng(setup.seed)
        self._numbers = [place for place, gene in enumerate(setup.space.genes) if not gene.choices]
        self._choices = [place for place, gene in enumerate(setup.space.genes) if gene.choices]
        self._history = CallDigest(setup.seed)
        self._uniform = self.starts_uniform or setup.from_uniform
        self._start = self._best = setup.space.to_unit(setup.space.uniform())
        self._best_value = -np.inf
        self._begun = False
        self._waiting: list[Array] = []
        self._handed: dict[tuple[float, ...], list[Array]] = {}
        self._scored: list[tuple[Array, float]] = []

    @abstractmethod
    def begin(self, start: Array) -> None:
        """Start from these numbers."""

    @abstractmethod
    def draw(self) -> list[Array]:
        """Return the numbers of the next population."""

    @abstractmethod
    def learn(self, points: Sequence[Array], costs: Sequence[float]) -> None:
        """Learn from the population's costs, to be minimized; at least one is finite."""

    def ask(self, size: int) -> Asking:
        self._history.add("ask", size)
        if not self._begun:
            self.begin((self._start if self._uniform else self._best)[self._numbers])
            self._begun = True
        if not self._waiting:
            self._close()
            self._waiting = self.draw()
        handed, self._waiting = self._waiting[:size], self._waiting[size:]
        suggestions: list[Suggestion] = []
        for numbers in handed:
            point = self._best.copy()
            point[self._numbers] = numbers[: len(self._numbers)]
            (point,) = redraw_choices(point[None], self._choices, self.REDRAW, self._random)
            genes = self._space.from_unit(point)
            self._handed.setdefault(genes_key(genes), []).append(numbers)
            suggestions.append(Suggestion(genes, self.origin))
        return suggestions
        yield  # makes this a generator, as Asking is

    def tell(self, trials: Sequence[Trial]) -> None:
        self._history.told(trials)
        for trial in trials:
            if trial.value > self._best_value:
                self._best_value, self._best = trial.value, self._space.to_unit(trial.candidate.genes)
            if trial.candidate.origin == "uniform":
                self._start = self._space.to_unit(trial.candidate.genes)
            waiting = self._handed.get(genes_key(trial.candidate.genes))
            if waiting:
                self._scored.append((waiting.pop(0), -trial.value))
        if not self._waiting:
            self._close()

    def retell(self, trials: Sequence[Trial], weights: Mapping[str, float]) -> None:
        """Find the best trial again; the scores of the current population stay as they were told."""
        self._history.told(trials)
        best = max(trials, key=lambda trial: trial.value, default=None)
        if best and best.score:
            self._best_value, self._best = best.value, self._space.to_unit(best.candidate.genes)

    def _close(self) -> None:
        """Learn from the population; points that were never told count as failed."""
        lost = [(point, np.inf) for points in self._handed.values() for point in points]
        scored = [*self._scored, *lost]
        self._handed, self._scored = {}, []
        if any(np.isfinite(cost) for _, cost in scored):
            self.learn([point for point, _ in scored], [cost for _, cost in scored])

    def state(self) -> str:
        return str(self._history)
