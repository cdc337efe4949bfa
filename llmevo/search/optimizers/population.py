"""What optimizers share that learn from whole populations of points in the unit cube."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmevo.search.optimizers.base import Asking, Optimizer, Setup
from llmevo.search.space import Genes
from llmevo.search.trial import Suggestion, Trial

Point = NDArray[np.float64]


class History:
    """A digest of everything an optimizer was asked and told.

    An optimizer that is a function of its setup and of these needs no other `state`: equal histories mean equal
    futures, whatever a library keeps inside.
    """

    def __init__(self, *setup: Any) -> None:
        self._hash = hashlib.sha256()
        self.add(*setup)

    def add(self, *parts: Any) -> None:
        self._hash.update(json.dumps(parts, sort_keys=True, default=str).encode())

    def told(self, trials: Sequence[Trial]) -> None:
        self.add("told", [(trial.value, trial.candidate.genes) for trial in trials])

    def __str__(self) -> str:
        return self._hash.hexdigest()[:16]


def key(genes: Genes) -> tuple[float, ...]:
    """What two equal candidates have in common."""
    return tuple(genes[name] for name in sorted(genes))


def redraw_choices(points: Point, choices: Sequence[int], rate: float, random: np.random.Generator) -> Point:
    """Points (one a row) with these of their genes drawn anew at a rate: choices have no order to step along."""
    redrawn = points.copy()
    for place in choices:
        anew = random.random(len(points)) < rate
        redrawn[anew, place] = random.random(int(anew.sum()))
    return redrawn


def at_least_two(numbers: Point) -> Point:
    """The numbers for a library that does not do one dimension: with a second one that nothing depends on."""
    return np.concatenate([numbers, np.full(max(0, 2 - len(numbers)), 0.5)])


class PopulationSearch(Optimizer):
    """Hands out a population of any size in pieces of any size, and learns when the last of it is scored.

    Only numbers are searched by the subclass; choices are those of the best trial, now and then drawn anew. A point
    that failed or was never told of has the cost infinity.
    """

    origin: str
    """The name of the optimizer, as the log has it."""

    starts_uniform = False
    """Whether it starts from the uniform merge instead of from the best start row."""

    REDRAW = 0.1
    """How often a choice is drawn anew."""

    def __init__(self, setup: Setup) -> None:
        self._space = setup.space
        self._budget = setup.budget
        self._random = np.random.default_rng(setup.seed)
        self._numbers = [place for place, gene in enumerate(setup.space.genes) if not gene.choices]
        self._choices = [place for place, gene in enumerate(setup.space.genes) if gene.choices]
        self._history = History(setup.seed)
        self._uniform = self.starts_uniform or setup.from_uniform
        self._start = self._best = setup.space.to_unit(setup.space.uniform())
        self._best_value = -np.inf
        self._begun = False
        self._waiting: list[Point] = []
        self._handed: dict[tuple[float, ...], list[Point]] = {}
        self._scored: list[tuple[Point, float]] = []

    @property
    def sigma(self) -> float | None:
        """The step size in shares of a gene's range."""
        return None

    @abstractmethod
    def begin(self, start: Point) -> None:
        """Make ready to start from these numbers."""

    @abstractmethod
    def draw(self) -> list[Point]:
        """The numbers of the next population."""

    @abstractmethod
    def learn(self, points: Sequence[Point], costs: Sequence[float]) -> None:
        """Take in the population's costs, to be minimised; at least one is finite."""

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
            self._handed.setdefault(key(genes), []).append(numbers)
            suggestions.append(Suggestion(genes, self.origin))
        return suggestions
        yield  # makes this a generator, as asking is

    def tell(self, trials: Sequence[Trial]) -> None:
        self._history.told(trials)
        for trial in trials:
            if trial.value > self._best_value:
                self._best_value, self._best = trial.value, self._space.to_unit(trial.candidate.genes)
            if trial.candidate.origin == "uniform":
                self._start = self._space.to_unit(trial.candidate.genes)
            waiting = self._handed.get(key(trial.candidate.genes))
            if waiting:
                self._scored.append((waiting.pop(0), -trial.value))
        if not self._waiting:
            self._close()

    def retell(self, trials: Sequence[Trial], weights: Mapping[str, float]) -> None:
        """The best so far may be another. What a population has scored stays as it was told."""
        self._history.told(trials)
        best = max(trials, key=lambda trial: trial.value, default=None)
        if best and best.score:
            self._best_value, self._best = best.value, self._space.to_unit(best.candidate.genes)

    def _close(self) -> None:
        """Learn from what was handed out; what nobody told of counts as failed."""
        lost = [(point, np.inf) for points in self._handed.values() for point in points]
        scored = [*self._scored, *lost]
        self._handed, self._scored = {}, []
        if any(np.isfinite(cost) for _, cost in scored):
            self.learn([point for point, _ in scored], [cost for _, cost in scored])

    def state(self) -> str:
        return str(self._history)
