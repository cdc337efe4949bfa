"""The share of the evaluations that an LLM has, and how often it is asked."""

from collections import deque

import numpy as np
import scipy  # its `stats` is loaded at its first use

from llmevo.search.space import Array

SUCCESS = {"chat": 0.5, "completion": 0.2}  # the LLM's first rate of success, by the prompting style
RIVAL_SUCCESS = 0.35  # the numeric engine's
PRIOR_WEIGHT = 2.0  # candidates that these are worth
WINDOW = 8  # the latest candidates of each that count
SHARPNESS = 3.0  # of the share over the rates
LEAST, MOST = 1 / 32, 0.75  # of the share: a bad LLM is asked again from time to time, as it may have learnt
PATIENCE = 2  # answers in a row without a proposal before the LLM is asked less often


class Share:
    """The share of the evaluations that an LLM has, by what its candidates turned out to be worth.

    A candidate's worth is the probability that it is better than the best one before it, by all scores so far. The
    share follows the rates of the LLM's candidates and of the numeric ones.
    """

    def __init__(self, first: float) -> None:
        self._own: deque[float] = deque(maxlen=WINDOW)
        self._rival: deque[float] = deque(maxlen=WINDOW)
        self._first = first
        self._credit = 0.0
        self._empty = self._since = 0

    @property
    def value(self) -> float:
        """Return the share, from 1/32 to 3/4."""
        own = (PRIOR_WEIGHT * self._first + sum(self._own)) / (PRIOR_WEIGHT + len(self._own))
        rival = (PRIOR_WEIGHT * RIVAL_SUCCESS + sum(self._rival)) / (PRIOR_WEIGHT + len(self._rival))
        return min(max(own**SHARPNESS / (own**SHARPNESS + rival**SHARPNESS), LEAST), MOST)

    def may_ask(self) -> bool:
        """Count a generation, and return whether the LLM is asked in it: after `PATIENCE` answers without a proposal,
        after twice as many generations each time.
        """
        may = self._empty <= PATIENCE or self._since >= 2 ** min(self._empty - PATIENCE, 5)
        self._since += 1
        return may

    def answered(self, usable: bool) -> None:
        """Count an answer, `usable` if a proposal of it is scored."""
        self._empty, self._since = (0 if usable else self._empty + 1), 0

    def slots(self, size: int) -> int:
        """Return how many of the next `size` candidates are the LLM's."""
        return int(min(self._credit + self.value * size, size) + 1e-9)

    def spend(self, size: int, slots: int) -> None:
        """Count a generation of `size` candidates, `slots` of them the LLM's; the rest of its share is saved up."""
        self._credit = max(min(self._credit + self.value * size, size) - slots, 0.0)

    def observe(self, improvement: float, own: bool) -> None:
        (self._own if own else self._rival).append(improvement)


def probability_of_improvement(means: Array, deviations: Array, best: float, least: float) -> Array:
    """Return the probability of each candidate to be better than `best`, by its expected score and standard deviation,
    which is at least `least`.
    """
    return np.asarray(scipy.stats.norm.cdf((means - best) / np.maximum(deviations, least)))
