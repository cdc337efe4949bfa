"""Random search: the baseline every other optimizer has to beat."""

from collections.abc import Sequence

import numpy as np

from llmevo.search.optimizers.base import Asking, Optimizer, Setup, digest
from llmevo.search.trial import Suggestion, Trial


class RandomSearch(Optimizer):
    """Points drawn evenly from the whole search space."""

    def __init__(self, setup: Setup) -> None:
        self._space = setup.space
        self._random = np.random.default_rng(setup.seed)

    def ask(self, size: int) -> Asking:
        points = self._random.random((size, len(self._space.genes)))
        return [Suggestion(self._space.from_unit(point), "random") for point in points]
        yield  # makes this a generator, as asking is

    def tell(self, trials: Sequence[Trial]) -> None:
        """Nothing is learnt."""

    def state(self) -> str:
        return digest(self._random)
