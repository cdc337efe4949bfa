"""The optimizers, with `ask` and `tell`. To add one: a file with a subclass of `Optimizer`, and its line here."""

from collections.abc import Callable

from llmevo.search.optimizers.base import Optimizer, Setup
from llmevo.search.optimizers.bayesian import BayesianOptimization
from llmevo.search.optimizers.cma_es import CmaEs, MergekitEvolve, SepCmaEs
from llmevo.search.optimizers.earlier.llm_guided_cma_es import LlmGuidedCmaEs
from llmevo.search.optimizers.earlier.surrogate_cma_es import SurrogateCmaEs
from llmevo.search.optimizers.llm import LlmLedSearch
from llmevo.search.optimizers.llm_evo_merge import LlmEvoMerge
from llmevo.search.optimizers.optuna_samplers import Gp, Nsga2, Tpe
from llmevo.search.optimizers.random_search import RandomSearch
from llmevo.search.optimizers.recommendation import recommend
from llmevo.search.optimizers.spsa import Spsa

OPTIMIZERS: dict[str, Callable[[Setup], Optimizer]] = {
    "llm": LlmLedSearch,
    "llm-off": BayesianOptimization,
    "llm-evo-merge": LlmEvoMerge,
    "cma-es": CmaEs,
    "mergekit-evolve": MergekitEvolve,
    "sep-cma-es": SepCmaEs,
    "spsa": Spsa,
    "tpe": Tpe,
    "gp": Gp,
    "nsga2": Nsga2,
    "random": RandomSearch,
}
"""Every optimizer by its name in configs and logs."""

EARLIER: dict[str, Callable[[Setup], Optimizer]] = {"llm": LlmGuidedCmaEs, "llm-off": SurrogateCmaEs}
"""The optimizers that these names had in logs with `rules` below 3."""

ASKING = ("llm", "llm-evo-merge", "paths")
"""The optimizers that ask an LLM; `paths` is in `search/paths/registry.py`."""

__all__ = ["ASKING", "EARLIER", "OPTIMIZERS", "Optimizer", "Setup", "recommend"]
