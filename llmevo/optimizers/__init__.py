"""The optimizers: values with ask and tell. `OPTIMIZERS` is the registry.

To add one: a file with a class that fits `Optimizer`, and its line here. The contract tests pick it up.
"""

from collections.abc import Callable

from llmevo.optimizers.base import Optimizer, Setup
from llmevo.optimizers.cma_es import CmaEs, MergekitEvolve
from llmevo.optimizers.llm import LlmEvolution, LlmOff
from llmevo.optimizers.llm_evo_merge import LlmEvoMerge
from llmevo.optimizers.nsga2 import Nsga2
from llmevo.optimizers.one_plus_one import OnePlusOne
from llmevo.optimizers.optuna_samplers import Gp, Tpe
from llmevo.optimizers.random_search import RandomSearch
from llmevo.optimizers.recommendation import recommend
from llmevo.optimizers.sep_cma_es import SepCmaEs
from llmevo.optimizers.spsa import Spsa

OPTIMIZERS: dict[str, Callable[[Setup], Optimizer]] = {
    "llm": LlmEvolution,
    "llm-off": LlmOff,
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

__all__ = ["OPTIMIZERS", "Optimizer", "Setup", "recommend"]
