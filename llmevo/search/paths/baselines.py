"""Plain searches of the same paths, to compare with: random edits, a genetic algorithm, single blocks, and the encoding
of the paper.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmevo.merging.path import Hop, LayerPath
from llmevo.models.gains import Gains
from llmevo.search.optimizers.base import Asking, Setup
from llmevo.search.optimizers.cma_es import strategy_in_unit_box
from llmevo.search.paths.edits import Edit, scaled
from llmevo.search.paths.search import TRIES, PathOptimizer, moved
from llmevo.search.space import Array
from llmevo.search.trial import Suggestion, Trial

OFFSPRING = 8  # λ of the genetic algorithm
REPETITIONS = 3  # r of the paper
FIRST_PASS, ELSEWHERE = 0.75, 0.25  # where the paper's indicators start: those of the first model's first pass, others
SIGMA = 1 / 6
PLAIN = Gains()


class PlainPaths(PathOptimizer):
    """A search of paths that asks no LLM."""

    def ask(self, size: int) -> Asking:
        self._history.add("ask", size)
        self._begin()
        return self._next(size)
        yield  # makes this a generator, as Asking is

    def _next(self, size: int) -> list[Suggestion]:
        """Return at most `size` new candidates."""
        raise NotImplementedError


class RandomEdits(PlainPaths):
    """Paths of one to `edits` random edits of the root's. Use it as the baseline of all path searches."""

    origin = "paths-random"

    def _next(self, size: int) -> list[Suggestion]:
        found = (self._draw(self._paths.settings.edits) for _ in range(size))
        return [one for one in found if one]


class GeneticPaths(PlainPaths):
    """A (1+λ) genetic algorithm with λ = 8: the best path so far, with an edit added, removed, moved or damped; where
    all of these are known, random edits.
    """

    origin = "paths-ga"

    def _next(self, size: int) -> list[Suggestion]:
        scored = [trial for trial in self._trials if trial.score and trial.candidate.path]
        best = max(scored, key=lambda trial: trial.rank, default=None)
        root = [trial for trial in self._trials if trial.score and self._name_of(trial) == self._root]
        parent: list[Edit] = []
        if best and not any(trial.rank >= best.rank for trial in root):
            parent = self._paths.edits(self._paths.parse(best.candidate.path), self._root)
        found = (self._mutant(parent) for _ in range(min(size, OFFSPRING)))
        mutants = [one for one in found if one]
        if mutants or self._setup.before_rules_5:
            return mutants
        other = self._draw(self._paths.settings.edits)
        return [other] if other else []

    def _mutant(self, parent: Sequence[Edit]) -> Suggestion | None:
        for _ in range(TRIES):
            edits = [*parent]
            place = int(self._random.integers(len(edits))) if edits else 0
            act = self._random.random()
            if not edits or (act < 0.5 and len(edits) < self._paths.settings.edits):
                edits += self._drawn(1)
            elif act < 0.85:
                others = moved(edits[place])
                edits[place] = others[int(self._random.integers(len(others)))]
            else:
                del edits[place]
            path = self._paths.edited(self._root, edits)
            if path is None or str(path) in self._known:
                continue
            if len(self._paths.edits(path, self._root)) <= self._paths.settings.edits:
                return self._suggest(path, self.origin)
        return None


class ExhaustiveBlocks(RandomEdits):
    """Every block of up to `longest` layers run twice, in random order (RYS, https://github.com/dnhkng/RYS); a small
    budget sees a random part of them. Random edits follow the last block.
    """

    origin = "paths-exhaustive"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._left: list[LayerPath] | None = None

    def _next(self, size: int) -> list[Suggestion]:
        if self._left is None:
            low, high, longest = self._paths.first, self._paths.layers - self._paths.last, self._paths.settings.longest
            edits = [Edit("repeat", i, j) for i in range(low, high) for j in range(i + 1, min(i + longest, high) + 1)]
            paths = [path for edit in edits if (path := self._paths.edited(self._root, [edit]))]
            self._left = [paths[int(place)] for place in self._random.permutation(len(paths))]
        found, self._left = self._left[:size], self._left[size:]
        return [self._suggest(path, self.origin) for path in found] or super()._next(size)


class CmaEsIndicators(PlainPaths):
    """The paper's encoding (Akiba et al., https://arxiv.org/abs/2403.13187, section 3.2): all layers of two models, in
    order, three times over; an indicator for each says whether it runs, and a scale what its branches are multiplied
    by. CMA-ES searches both.

    Here scales are gains of the branches, one for each place instead of the paper's matrix, of which only so many
    numbers have an effect along a path. Of a path that is too deep the layers with the lowest indicators are left out.
    The limit on edits does not hold.
    """

    origin = "paths-cma-es"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._strategy: Any = None
        self._waiting: list[Array] = []
        self._handed: dict[str, list[Array]] = {}
        self._scored: list[tuple[Array, float]] = []

    def _next(self, size: int) -> list[Suggestion]:
        strategy = self._strategy = self._strategy or self._start()
        if not self._waiting:
            self._learn()
            self._waiting = strategy.ask()
        handed, self._waiting = self._waiting[:size], self._waiting[size:]
        found: list[Suggestion] = []
        for point in handed:
            path = self._path(point)
            self._handed.setdefault(str(path), []).append(point)
            if not any(one.path == str(path) for one in found):
                found.append(self._suggest(path, self.origin, "indicators"))
        return found

    def tell(self, trials: Sequence[Trial]) -> None:
        super().tell(trials)
        for trial in trials:
            for point in self._handed.pop(trial.candidate.path, []):
                self._scored.append((point, -trial.value))

    def _start(self) -> Any:
        layers = self._paths.layers
        whole = [t for t in self._trials if t.score and self._name_of(t) not in ("", self._root)]
        second = max(whole, key=lambda trial: trial.rank, default=None)
        self._two = (self._root, self._name_of(second) if second else self._root)
        self._places = [(name, layer) for _ in range(REPETITIONS) for name in self._two for layer in range(layers)]
        indicators = np.full(len(self._places), ELSEWHERE)
        indicators[:layers] = FIRST_PASS
        low, high = np.log(self._paths.settings.gains)
        scales = np.full(len(self._places), np.clip(-low / (high - low), 0.0, 1.0) if high > low else 0.5)
        return strategy_in_unit_box(np.concatenate([indicators, scales]), SIGMA, self._random)

    def _path(self, point: Array) -> LayerPath:
        """The path of the indicators above a half, with the first and last layer of the root at its ends."""
        count, layers = len(self._places), self._paths.layers
        first, last = self._paths.first, layers - self._paths.last
        inside = [place for place in range(count) if first <= self._places[place][1] < last]
        on = [place for place in inside if point[place] > 0.5]
        room = self._paths.deepest - self._paths.first - self._paths.last
        kept = {*sorted(on, key=lambda place: (-point[place], place))[:room]}
        low, high = np.log(self._paths.settings.gains)
        hops = [Hop(self._root, layer) for layer in range(first)]
        for place in sorted(kept):
            gain = float(np.exp(low + point[count + place] * (high - low)))
            hops.append(Hop(*self._places[place], scaled(PLAIN, min(max(gain, np.exp(low)), np.exp(high)))))
        return LayerPath.of_hops([*hops, *(Hop(self._root, layer) for layer in range(last, layers))])

    def _learn(self) -> None:
        """Learn from the population; points that were never told, or failed, count as the worst."""
        lost = [(point, np.inf) for points in self._handed.values() for point in points]
        scored, self._handed, self._scored = [*self._scored, *lost], {}, []
        finite = [cost for _, cost in scored if np.isfinite(cost)]
        if finite:
            self._strategy.tell([p for p, _ in scored], [min(cost, max(finite) + 1.0) for _, cost in scored])
