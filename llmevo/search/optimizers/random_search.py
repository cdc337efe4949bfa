"""Random search."""

from collections.abc import Sequence

import numpy as np

from llmevo.search.optimizers.base import Asking, Optimizer, Setup, digest
from llmevo.search.trial import Suggestion, Trial


class RandomSearch(Optimizer):
    """Points drawn uniformly from the whole search space: the baseline of all other optimizers."""

    is_steady = True

    def __init__(self, setup: Setup) -> None:
        self._space = setup.space
        self._random = np.random.default_rng(setup.seed)

    def ask(self, size: int) -> Asking:
        points = self._random.random((size, len(self._space.genes)))
        return [Suggestion(self._space.from_unit(point), "random") for point in points]
        yield  # makes this a generator, as Asking is

    def expect(self, pending: Sequence[Suggestion]) -> None:
        """Change nothing: random points do not depend on pending ones."""

    def tell(self, trials: Sequence[Trial]) -> None:
        """Learn nothing."""

    def state(self) -> str:
        return digest(self._random)
