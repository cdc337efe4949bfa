"""CMA-ES by pycma: the baseline to beat, and as mergekit-evolve starts it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmevo.search.optimizers.population import PopulationSearch, at_least_two
from llmevo.search.space import Array

SIGMA = 1 / 6  # the first step size of mergekit-evolve (`--sigma0`), a share of a gene's range


def strategy_in_unit_box(start: Array, sigma: float, random: np.random.Generator, **options: Any) -> Any:
    """Return pycma's strategy in the unit box, with all its numbers from one generator."""
    import cma

    own: dict[str, Any] = {
        "bounds": [0, 1],
        "randn": lambda *shape: random.standard_normal(shape),
        "seed": np.nan,  # its own seeding would seed all of numpy
        "verbose": -9,
        "verb_log": 0,
    }
    return cma.CMAEvolutionStrategy(start, sigma, own | options)


class CmaEs(PopulationSearch):
    """pycma with the settings of mergekit-evolve, bounded to the genes' ranges.

    It starts from the best start row with step size 1/6 and a population of 4 + ⌊3 ln genes⌋ (Hansen,
    https://arxiv.org/abs/1604.00772, equation 48) or of the config's `search.population`, or of one candidate for each
    worker if that is more. Use it as the baseline, or for more than a thousand evaluations.
    """

    origin = "cma-es"
    _strategy: Any = None

    @property
    def sigma(self) -> float:
        return min(float(self._strategy.sigma), 1.0) if self._strategy else SIGMA

    def begin(self, start: Array) -> None:
        start = at_least_two(start)
        size = max(self._parallel, self._population or 4 + int(3 * np.log(len(start))))
        self._strategy = strategy_in_unit_box(start, SIGMA, self._random, popsize=size)

    def draw(self) -> list[Array]:
        return self._strategy.ask()

    def learn(self, points: Sequence[Array], costs: Sequence[float]) -> None:
        worst = max(cost for cost in costs if np.isfinite(cost))
        self._strategy.tell([*points], [min(cost, worst + 1.0) for cost in costs])  # only the order counts


class MergekitEvolve(CmaEs):
    """pycma with the settings of mergekit-evolve and its start, the uniform merge. Use it to compare with that tool."""

    origin = "mergekit-evolve"
    starts_uniform = True


class SepCmaEs(PopulationSearch):
    """CMA-ES with a diagonal covariance (Ros and Hansen 2008), which needs fewer samples, from the best start row.

    Use it for a hundred genes and more.
    """

    origin = "sep-cma-es"
    _strategy: Any = None

    @property
    def sigma(self) -> float:
        return min(float(self._strategy._sigma), 1.0) if self._strategy else SIGMA

    def begin(self, start: Array) -> None:
        from cmaes import SepCMA

        padded = at_least_two(start)
        bounds = np.tile([0.0, 1.0], (len(padded), 1))
        seed = int(self._random.integers(2**31))
        size = max(self._parallel, self._population or 4 + int(3 * np.log(len(padded))))
        self._strategy = SepCMA(mean=padded, sigma=SIGMA, bounds=bounds, seed=seed, population_size=size)

    def draw(self) -> list[Array]:
        return [self._strategy.ask() for _ in range(self._strategy.population_size)]

    def learn(self, points: Sequence[Array], costs: Sequence[float]) -> None:
        self._strategy.tell([*zip(points, costs, strict=True)])
