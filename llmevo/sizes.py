"""How many candidates a generation has."""

from llmevo.bench import Bench
from llmevo.state import RunState


def population(bench: Bench) -> int:
    """Candidates a generation: the config's, or the rule of CMA-ES (https://arxiv.org/abs/1604.00772, eq. 48)."""
    return bench.config.search.population_of(len(bench.space.genes))


def ask_size(bench: Bench, state: RunState) -> int:
    """Candidates of the next generation; 0 when the budget is spent, or no further one is sure to fit into it."""
    return bench.config.search.budget.size(state, population(bench))
