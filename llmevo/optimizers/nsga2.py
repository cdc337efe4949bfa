"""NSGA-II: a population that moves towards the whole Pareto front at once."""

from typing import Any

from llmevo.optimizers.base import Setup
from llmevo.optimizers.optuna_samplers import OptunaSearch

SMALLEST, LARGEST = 8, 50
"""Of a population; the larger one is Optuna's own."""

GENERATIONS = 8
"""To plan for: a population is the budget by this."""


class Nsga2(OptunaSearch):
    """Non-dominated sorting and crowding distance (Deb et al. 2002, https://doi.org/10.1109/4235.996017), by Optuna,
    with simulated binary crossover.

    Use it with `objective: pareto`, for some hundred evaluations and more; it learns from no model of the scores. With
    `objective: sum` it is a genetic algorithm of one aim.
    """

    origin = "nsga2"
    rows_asked = True

    def sampler(self, setup: Setup) -> Any:
        from optuna.samplers import NSGAIISampler
        from optuna.samplers.nsgaii import SBXCrossover

        size = min(LARGEST, max(SMALLEST, setup.budget // GENERATIONS))
        return NSGAIISampler(population_size=size, crossover=SBXCrossover(), seed=setup.seed)
