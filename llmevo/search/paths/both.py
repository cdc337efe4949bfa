"""The search of both spaces: weights first, then the path over the best merge, then the numbers of that path."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from llmevo.merging.path import LayerPath, Segment
from llmevo.search.optimizers.base import Asking, CallDigest, Optimizer, Setup, genes_key
from llmevo.search.optimizers.bayesian import BayesianOptimization
from llmevo.search.paths.search import PathSearch
from llmevo.search.paths.space import MERGE
from llmevo.search.space import Gene, Genes, SearchSpace
from llmevo.search.trial import Candidate, Suggestion, Trial

GAINS = 8  # genes of gains at most


class FixedPath(SearchSpace):
    """The numbers of one path: the gain of each segment that repeats layers or has one already, between the first
    segment and the last, and the weights of the merge where it has one. Segments with several gains keep these.
    """

    def __init__(self, space: SearchSpace, path: LayerPath, genes: Genes, before_rules_5: bool = False) -> None:
        """`before_rules_5`: see `Setup`; every segment between the first and the last then has a gain."""
        super().__init__(space.genome, space.layers, space.routers, space.by_token)
        self._path, self._start_genes = path, genes
        self._merged = any(segment.model == MERGE for segment in path.segments)
        inside = range(1, len(path.segments) - 1)
        self._places = [place for place in inside if before_rules_5 or _has_gain(path, place)][:GAINS]

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        low, high = self.paths.settings.gains
        gains = [Gene(f"gain/{place}", None, None, None, "gain", low, high) for place in self._places if low < high]
        return (*(super().genes if self._merged else ()), *gains)

    def active(self, genes: Mapping[str, float]) -> NDArray[np.bool_]:
        gains = np.ones(sum(gene.parameter == "gain" for gene in self.genes), dtype=bool)
        if not self._merged:
            return gains
        weights = SearchSpace(self.genome, self.layers, self.routers, self.by_token)
        return np.concatenate([weights.active(genes), gains])

    def start(self) -> Genes:
        """Return the genes of the path itself."""
        gains = {f"gain/{place}": self._path.segments[place].gains.attention for place in self._places}
        return self.clamp({**self._start_genes, **gains})

    def uniform(self) -> Genes:
        return self.start()

    def candidate(self, genes: Genes) -> tuple[Genes, LayerPath]:
        """Return the weights and the path with the gains of these genes."""
        segments: list[Segment] = []
        for place, segment in enumerate(self._path.segments):
            value = genes.get(f"gain/{place}")
            gains = {} if value is None else {"attention": value, "mlp": value}
            segments.append(replace(segment, gains=segment.gains.model_copy(update=gains)))
        weights = {name: value for name, value in genes.items() if not name.startswith("gain/")}
        return weights if self._merged else {}, replace(self._path, segments=tuple(segments))


def _has_gain(path: LayerPath, place: int) -> bool:
    """Whether one gain, of both branches, is a number of this segment of a path."""
    segment, before = path.segments[place], path.segments[:place]
    again = segment.stop <= max(each.stop for each in before)
    return segment.gains.attention == segment.gains.mlp and (again or segment.gains.attention != 1.0)


class FixedPathSearch(Optimizer):
    """Bayesian optimization of the numbers of one path."""

    learns_paths = True
    origin = "path-numbers"

    def __init__(self, setup: Setup, best: Trial) -> None:
        path, genes = setup.space.paths.parse(best.candidate.path), best.candidate.genes
        self._space = FixedPath(setup.space, path, genes, setup.before_rules_5)
        self._inner = (
            BayesianOptimization(replace(setup, space=self._space, presumed={})) if self._space.genes else None
        )
        self._asked: dict[tuple[str, tuple[float, ...]], Genes] = {}
        start = self._space.start()
        # Its gains may be out of bounds.
        if setup.before_rules_5 or self._space.candidate(start) == (genes, path):
            self._asked[_identity(best.candidate.path, genes)] = start

    @property
    def is_empty(self) -> bool:
        """Whether the path has no numbers to search."""
        return self._inner is None

    def ask(self, size: int) -> Asking:
        if self._inner is None:
            return []
        found: list[Suggestion] = []
        for one in (yield from self._inner.ask(size)):
            weights, path = self._space.candidate(one.genes)
            self._asked[_identity(str(path), weights)] = one.genes
            found.append(Suggestion(weights, self.origin, "", expected=one.expected, path=str(path)))
        return found

    def tell(self, trials: Sequence[Trial]) -> None:
        if self._inner:
            self._inner.tell(self._inside(trials))

    def retell(self, trials: Sequence[Trial], weights: Mapping[str, float]) -> None:
        if self._inner:
            self._inner.retell(self._inside(trials), weights)

    def extend(self, evaluations: int) -> None:
        if self._inner:
            self._inner.extend(evaluations)

    def state(self) -> str:
        return self._inner.state() if self._inner else ""

    def _inside(self, trials: Sequence[Trial]) -> list[Trial]:
        """The trials of this path, as points of its space."""
        found: list[Trial] = []
        for trial in trials:
            genes = self._asked.get(_identity(trial.candidate.path, trial.candidate.genes))
            if genes is not None:
                own = Candidate(trial.candidate.id, trial.candidate.generation, trial.candidate.origin, genes)
                found.append(replace(trial, candidate=own))
        return found


def _identity(path: str, genes: Genes) -> tuple[str, tuple[float, ...]]:
    return path, genes_key(genes)


class BothSpaces(Optimizer):
    """Weights by an optimizer of weights, then paths over the models and the best merge, then the gains and weights of
    the best path together, as in the paper (Akiba et al., https://arxiv.org/abs/2403.13187), within one budget.

    Each part begins when the parts before have had their share of the evaluations, or have no candidate left. Where no
    path is better than the best merge, the last part goes on with its weights.
    """

    learns_paths = True

    def __init__(self, setup: Setup, weights: Callable[[Setup], Optimizer], shares: Sequence[float]) -> None:
        """`shares` are the three parts' shares of the evaluations, with the sum 1."""
        self._setup, self._shares = setup, shares
        self._history = CallDigest(setup.seed, [*shares])
        self._weights = weights(setup)
        self._paths: PathSearch | None = None
        self._numbers: FixedPathSearch | None = None
        self._trials: list[Trial] = []
        self._part = 0
        self._budget = setup.budget

    @property
    def _current(self) -> Optimizer:
        if self._part == 0 or (self._part == 2 and self._numbers is None):
            return self._weights
        return self._numbers if self._numbers and not self._numbers.is_empty else self._paths or self._weights

    @property
    def sigma(self) -> float | None:
        return self._current.sigma

    @property
    def trust(self) -> float | None:
        return self._current.trust

    def ask_start(self, rows: Sequence[Suggestion]) -> Asking:
        return (yield from self._weights.ask_start(rows))

    def ask(self, size: int) -> Asking:
        self._history.add("ask", size)
        ends = [round(self._budget * sum(self._shares[: place + 1])) for place in range(2)]
        part = sum(len(self._trials) >= end for end in ends)
        if part > self._part:
            self._enter(part)
        left = [end - len(self._trials) for end in ends][self._part : self._part + 1]
        self._weights.beside = self.beside
        found = yield from self._current.ask(max(1, min([size, *left])))
        while not found and self._part < 2 and not self._setup.before_rules_5:
            self._enter(self._part + 1)
            found = yield from self._current.ask(size)
        self._history.add("asked", self._part)
        return found

    def _enter(self, part: int) -> None:
        """Begin the next part with all trials so far."""
        if part >= 1 and self._paths is None:
            self._paths = PathSearch(self._setup)
            self._paths.tell(self._trials)
        self._part = part
        if part == 2:
            best = max((trial for trial in self._trials if trial.score), key=lambda trial: trial.rank, default=None)
            if best and best.candidate.path:
                self._numbers = FixedPathSearch(self._setup, best)
                self._numbers.tell(self._trials)

    def tell(self, trials: Sequence[Trial]) -> None:
        self._history.told(trials)
        self._trials += trials
        self._weights.tell([trial for trial in trials if trial.candidate.lies_in(self._setup.space)])
        for part in (self._paths, self._numbers):
            if part:
                part.tell(trials)

    def retell(self, trials: Sequence[Trial], weights: Mapping[str, float]) -> None:
        self._history.told(trials)
        self._trials = [*trials]
        self._weights.retell([trial for trial in trials if trial.candidate.lies_in(self._setup.space)], weights)
        for part in (self._paths, self._numbers):
            if part:
                part.retell(trials, weights)

    def extend(self, evaluations: int) -> None:
        self._budget = evaluations
        if not self._setup.before_rules_5:
            self._setup = replace(self._setup, budget=evaluations, budget_is_known=True)
        for part in (self._weights, self._paths, self._numbers):
            if part:
                part.extend(evaluations)

    def state(self) -> str:
        parts = [part.state() for part in (self._weights, self._paths, self._numbers) if part]
        return str(CallDigest(str(self._history), *parts))
