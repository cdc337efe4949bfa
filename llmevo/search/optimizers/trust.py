"""How much of the search an LLM has earned."""

from collections import deque
from collections.abc import Sequence

PRIOR = {"chat": 0.25, "completion": 0.15}
"""The share that an LLM starts with, by prompting style: base models rarely do more than recombine."""


CAP = 0.5
"""At least half of every generation is drawn by the numeric engine, whoever the LLM is."""


WINDOW = 8
"""How many of the LLM's latest candidates count."""


PRIOR_WEIGHT = 2
"""How many candidates the prior is worth."""


FLOOR, SLOPE = 0.2, 1.4
"""Trust is this and so much more for every unit by which the mean rank is over a half (measured)."""


PROBE = 32
"""An LLM without trust is asked for one candidate in so many evaluations: it may have got better."""


PATIENCE = 3
"""So many answers in a row may be lost before that is held against the LLM: servers restart."""


class Trust:
    """A share of the evaluations that follows what the LLM's own candidates turned out to be worth.

    Each of them is ranked among the numeric candidates of its time: 1 above all, 0 below all or failed. Trust is a
    straight line of the mean of the latest ranks, between 0 and a half. Repetitions never get this far, so copying
    the best earns nothing.
    """

    def __init__(self, prior: float) -> None:
        self._prior = min(max((prior - FLOOR) / SLOPE + 0.5, 0.0), 1.0)
        self._ranks: deque[float] = deque(maxlen=WINDOW)
        self._credit = 0.0
        self._since = 0
        self._lost = 0

    @property
    def value(self) -> float:
        """From 0 to a half."""
        mean = (PRIOR_WEIGHT * self._prior + sum(self._ranks)) / (PRIOR_WEIGHT + len(self._ranks))
        return min(max(FLOOR + SLOPE * (mean - 0.5), 0.0), CAP)

    def slots(self, size: int) -> int:
        """How many of the next `size` candidates are the LLM's; shares of one are saved up."""
        self._since += size
        self._credit = min(self._credit + self.value * size, CAP * size + 1.0)
        slots = min(int(self._credit), max(1, int(CAP * size)))
        if not slots and self._since > PROBE:
            slots, self._credit = 1, 1.0
        if slots:
            self._credit -= slots
            self._since = 0
        return slots

    def observe(self, value: float, others: Sequence[float]) -> None:
        """One of the LLM's candidates has a score (-inf if it failed), and so have numeric ones."""
        self._lost = 0
        if others:
            below = sum(value > other for other in others) + 0.5 * sum(value == other for other in others)
            self._ranks.append(below / len(others) if value > float("-inf") else 0.0)

    def reject(self, lost: bool = False) -> None:
        """No proposal was worth scoring, or none came: what is lost once or twice says nothing of the LLM's worth."""
        self._lost = self._lost + 1 if lost else 0
        if not lost or self._lost > PATIENCE:
            self._ranks.append(0.0)
