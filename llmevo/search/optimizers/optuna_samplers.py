"""Optuna's samplers. With several objectives a study has a direction for each task; each trial has its violation."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from llmevo.search.optimizers.base import Asking, CallDigest, Optimizer, Setup, genes_key
from llmevo.search.space import Gene
from llmevo.search.trial import Suggestion, Trial


class OptunaSearch(Optimizer):
    """One of Optuna's samplers, asked for one candidate for each worker: more would learn from fewer scores."""

    origin = ""
    rows_asked = False
    """True if start rows are enqueued and asked for, so that they belong to a generation, instead of added."""

    def __init__(self, setup: Setup) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)  # others would break into the display
        self._space, self._tasks = setup.space, setup.tasks if setup.pareto else {}
        self._constrained = bool(setup.constraints)
        self._history = CallDigest(setup.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that parts of it are experimental
            directions: Any = ["maximize"] * max(1, len(self._tasks))
            self._study: Any = optuna.create_study(directions=directions, sampler=self.sampler(setup))
        self._at_once = 1 if setup.before_rules_5 else setup.parallel
        self._asked: dict[tuple[float, ...], list[Any]] = {}
        self._distributions = {gene.name: self._distribution(gene) for gene in setup.space.genes}

    @abstractmethod
    def sampler(self, setup: Setup) -> Any:
        """Return the sampler."""

    @staticmethod
    def _distribution(gene: Gene) -> Any:
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        return CategoricalDistribution(gene.choices) if gene.choices else FloatDistribution(gene.low, gene.high)

    def ask(self, size: int) -> Asking:
        count = max(1, min(size, self._at_once))
        self._history.add("ask", *([count] if count > 1 else []))
        return [self._suggestion() for _ in range(count)]
        yield  # makes this a generator, as Asking is

    def _suggestion(self) -> Suggestion:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = self._study.ask(self._distributions)
        values = {
            gene.name: float(gene.choices.index(trial.params[gene.name])) if gene.choices else trial.params[gene.name]
            for gene in self._space.genes
        }
        genes = self._space.clamp(values)
        self._asked.setdefault(genes_key(genes), []).append(trial)
        return Suggestion(genes, self.origin)

    def tell(self, trials: Sequence[Trial]) -> None:
        from optuna.trial import TrialState, create_trial

        self._history.told(trials)
        if self._tasks or self._constrained:
            self._history.add([(self._values(trial), trial.violation) for trial in trials])
        for trial in trials:
            genes, values = trial.candidate.genes, self._values(trial)
            waiting = self._asked.get(genes_key(genes))
            known = waiting.pop(0) if waiting else None
            if known is None:
                if values is None or not self._space.contains(genes):
                    continue
                params = {
                    g.name: g.choices[int(genes[g.name])] if g.choices else genes[g.name] for g in self._space.genes
                }
                if not (self.rows_asked or self._constrained):
                    made = create_trial(params=params, distributions=self._distributions, values=values)
                    self._study.add_trial(made)
                    continue
                self._study.enqueue_trial(params)
                known = self._study.ask(self._distributions)
            if values and self._constrained:
                known.set_constraint("violation", trial.violation)
            self._study.tell(known, values, state=None if values else TrialState.FAIL)

    def _values(self, trial: Trial) -> list[float] | None:
        """The score, or each task's metric with its sign, higher being better; None for a failure."""
        if trial.score is None:
            return None
        metrics = trial.score.tasks
        found = [math.copysign(1.0, w) * metrics.get(t, {}).get(m, math.nan) for t, (w, m) in self._tasks.items()]
        values = found or [trial.score.total]
        return values if all(map(math.isfinite, values)) else None

    def state(self) -> str:
        return str(self._history)


class Tpe(OptunaSearch):
    """Tree-structured Parzen estimator, multivariate (Bergstra et al. 2011; Falkner et al. 2018).

    Use it where many genes are choices.
    """

    origin = "tpe"

    def sampler(self, setup: Setup) -> Any:
        from optuna.samplers import TPESampler

        several = setup.parallel > 1 and not setup.before_rules_5
        # Candidates that are being scored count as bad ones, so that those asked for together are different.
        return TPESampler(seed=setup.seed, multivariate=True, constant_liar=several)


class Gp(OptunaSearch):
    """A Gaussian process with expected improvement over the whole space.

    Use it where scoring a candidate takes much longer than choosing it. On four BBOB functions in 20 dimensions it came
    as close to the optimum as `llm-off`, but took a minute of its own for 200 trials, where `llm-off` took less than a
    second (`benchmarks/results/optimizers-bbob.md`).
    """

    origin = "gp"

    def sampler(self, setup: Setup) -> Any:
        from optuna.samplers import GPSampler

        return GPSampler(seed=setup.seed)


SMALLEST, LARGEST = 8, 50  # of a population; Optuna's own is 50
GENERATIONS = 8  # a population is the budget divided by this


class Nsga2(OptunaSearch):
    """Non-dominated sorting and crowding distance (Deb et al. 2002, https://doi.org/10.1109/4235.996017), by Optuna,
    with simulated binary crossover.

    Use it with `objective: pareto` and some hundred evaluations or more: it has no model of the scores. With
    `objective: sum` it is a genetic algorithm with one objective.
    """

    origin = "nsga2"
    rows_asked = True

    def sampler(self, setup: Setup) -> Any:
        from optuna.samplers import NSGAIISampler
        from optuna.samplers.nsgaii import SBXCrossover

        size = setup.population or min(LARGEST, max(SMALLEST, setup.budget // GENERATIONS))
        return NSGAIISampler(population_size=size, crossover=SBXCrossover(), seed=setup.seed)
