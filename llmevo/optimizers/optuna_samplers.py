"""Bayesian optimization as Optuna does it: TPE and a Gaussian process with expected improvement."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from llmevo.genes import Gene
from llmevo.optimizers.base import Asking, Setup
from llmevo.optimizers.population import History, key
from llmevo.trial import Suggestion, Trial


class OptunaSearch(ABC):
    """One of Optuna's samplers, asked for one candidate at a time, as it works best."""

    sigma: float | None = None
    origin = ""

    def __init__(self, setup: Setup) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = setup.space
        self._history = History(setup.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that parts of it are experimental
            self._study: Any = optuna.create_study(direction="maximize", sampler=self.sampler(setup.seed))
        self._asked: dict[tuple[float, ...], Any] = {}
        self._distributions = {gene.name: self._distribution(gene) for gene in setup.space.genes}

    @abstractmethod
    def sampler(self, seed: int) -> Any:
        """The sampler that is asked."""

    @staticmethod
    def _distribution(gene: Gene) -> Any:
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        return CategoricalDistribution(gene.choices) if gene.choices else FloatDistribution(gene.low, gene.high)

    def ask(self, size: int) -> Asking:
        self._history.add("ask")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = self._study.ask(self._distributions)
        values = {
            gene.name: float(gene.choices.index(trial.params[gene.name])) if gene.choices else trial.params[gene.name]
            for gene in self._space.genes
        }
        genes = self._space.clamp(values)
        self._asked[key(genes)] = trial
        return [Suggestion(genes, self.origin)]
        yield  # makes this a generator, as asking is

    def tell(self, trials: Sequence[Trial]) -> None:
        from optuna.trial import TrialState, create_trial

        self._history.told(trials)
        for trial in trials:
            genes = trial.candidate.genes
            known = self._asked.pop(key(genes), None)
            if known is not None:
                value = trial.score.total if trial.score else None
                self._study.tell(known, value, state=None if trial.score else TrialState.FAIL)
            elif trial.score and self._space.contains(genes):
                params = {
                    g.name: g.choices[int(genes[g.name])] if g.choices else genes[g.name] for g in self._space.genes
                }
                made = create_trial(params=params, distributions=self._distributions, value=trial.score.total)
                self._study.add_trial(made)

    def state(self) -> str:
        return str(self._history)


class Tpe(OptunaSearch):
    """Tree-structured Parzen estimator, multivariate (Bergstra et al. 2011; Falkner et al. 2018).

    Use it where many genes are choices.
    """

    origin = "tpe"

    def sampler(self, seed: int) -> Any:
        from optuna.samplers import TPESampler

        return TPESampler(seed=seed, multivariate=True)


class Gp(OptunaSearch):
    """A Gaussian process with expected improvement over the whole space.

    Use it for up to ten genes; further ones make it slow and, far from the best trial, blind.
    """

    origin = "gp"

    def sampler(self, seed: int) -> Any:
        from optuna.samplers import GPSampler

        return GPSampler(seed=seed)
