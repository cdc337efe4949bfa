"""The optimizers of layer paths, by their names in configs and logs."""

from collections.abc import Callable, Mapping, Sequence

from llmevo.search.optimizers import OPTIMIZERS
from llmevo.search.optimizers.base import Optimizer, Setup
from llmevo.search.paths.baselines import CmaEsIndicators, ExhaustiveBlocks, GeneticPaths, RandomEdits
from llmevo.search.paths.search import PathSearch
from llmevo.search.paths.settings import Kind

PATHS: Mapping[str, Callable[[Setup], Optimizer]] = {
    "paths": PathSearch,
    "paths-random": RandomEdits,
    "paths-ga": GeneticPaths,
    "paths-exhaustive": ExhaustiveBlocks,
    "paths-cma-es": CmaEsIndicators,
}
"""The optimizers that search layer paths instead of weights."""

MAKES: Mapping[str, Sequence[Kind]] = {
    "paths-exhaustive": ("repeat",),
    "paths-cma-es": ("repeat", "skip", "swap"),
}
"""The kinds of edits that an optimizer makes whatever `genome.path.kinds` says."""


def every() -> dict[str, Callable[[Setup], Optimizer]]:
    """Return all optimizers, those of weights first."""
    return {**OPTIMIZERS, **PATHS}
