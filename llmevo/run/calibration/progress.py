"""How much of a measurement is done, and the time left: a line every quarter of a minute."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

EVERY = 15.0
"""Seconds between two lines."""

Item = TypeVar("Item")


class Progress:
    """Of so many models that take about as long each."""

    def __init__(self, models: int, say: Callable[[str], None]) -> None:
        self.models, self.say = models, say
        self.started = self.said = time.monotonic()
        self.done = 0.0
        """Models, the share of the one that is read now included."""

    def through(self, items: Iterable[Item], sizes: Sequence[int], models: int = 1) -> Iterator[Item]:
        """Yield the items that are the work of so many models, of these sizes, counting each when it is done."""
        before, total, read = self.done, sum(sizes), 0
        for item, size in zip(items, sizes, strict=True):
            yield item
            read += size
            self.done = before + models * read / total
            self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self.said < EVERY or self.done >= self.models:
            return
        self.said, took = now, now - self.started
        left = took * (self.models - self.done) / self.done
        self.say(f"  {self.done / self.models:.0%} measured in {took:.0f} s, about {left:.0f} s left")
