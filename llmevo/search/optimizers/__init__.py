"""The optimizers: values with ask and tell. `OPTIMIZERS` is the registry.

To add one: a file with a class that fits `Optimizer`, and its line here. The contract tests pick it up.
"""

from collections.abc import Callable

from llmevo.search.optimizers.base import Optimizer, Setup
from llmevo.search.optimizers.cma_es import CmaEs, MergekitEvolve, SepCmaEs
from llmevo.search.optimizers.llm import LlmGuidedCmaEs, SurrogateCmaEs
from llmevo.search.optimizers.llm_evo_merge import LlmEvoMerge
from llmevo.search.optimizers.one_plus_one import OnePlusOne
from llmevo.search.optimizers.optuna_samplers import Gp, Nsga2, Tpe
from llmevo.search.optimizers.random_search import RandomSearch
from llmevo.search.optimizers.recommendation import recommend
from llmevo.search.optimizers.spsa import Spsa

OPTIMIZERS: dict[str, Callable[[Setup], Optimizer]] = {
    "llm": LlmGuidedCmaEs,
    "llm-off": SurrogateCmaEs,
    "llm-evo-merge": LlmEvoMerge,
    "cma-es": CmaEs,
    "mergekit-evolve": MergekitEvolve,
    "sep-cma-es": SepCmaEs,
    "one-plus-one": OnePlusOne,
    "spsa": Spsa,
    "tpe": Tpe,
    "gp": Gp,
    "nsga2": Nsga2,
    "random": RandomSearch,
}
"""Every optimizer by the name the config and the log use."""

ASKING = ("llm", "llm-evo-merge")
"""The optimizers that ask an LLM."""

__all__ = ["ASKING", "OPTIMIZERS", "Optimizer", "Setup", "recommend"]
