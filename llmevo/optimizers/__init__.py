"""The optimizers: values with ask and tell. `OPTIMIZERS` is the registry.

To add one: a file with a class that fits `Optimizer`, and its line here. The contract tests pick it up.
"""

from collections.abc import Callable

from llmevo.optimizers.base import Optimizer, Setup
from llmevo.optimizers.llm import LlmEvolution
from llmevo.optimizers.random_search import RandomSearch

OPTIMIZERS: dict[str, Callable[[Setup], Optimizer]] = {"llm": LlmEvolution, "random": RandomSearch}
"""Every optimizer by the name the config and the log use."""

__all__ = ["OPTIMIZERS", "Optimizer", "Setup"]
