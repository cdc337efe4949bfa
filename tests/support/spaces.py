"""Search spaces of models that need not exist."""

from typing import Any

from llmevo.search.genome import Genome
from llmevo.search.space import SearchSpace

NAMES = ("org/alpha", "org/beta", "org/gamma", "org/delta")


def space(models: int = 2, layers: int = 4, **keys: Any) -> SearchSpace:
    """Task vectors of the first `models` names, added to `org/base`; `keys` are of the genome."""
    genome = {"models": [*NAMES[:models]], "merge_method": "task_arithmetic", "base_model": "org/base", **keys}
    return SearchSpace(Genome.model_validate(genome), layers)
