"""What does not change between candidates, kept within a limit of memory."""

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, TypeVar

Value = TypeVar("Value")


class Cache:
    """Arrays and numbers that are computed once; use one for all merges of the same sources.

    What fits first stays: candidates go over all tensors in the same order, and dropping the oldest entry for the
    newest would then mean that nothing is ever found again.
    """

    def __init__(self, limit: float) -> None:
        """`limit` in bytes; 0 keeps numbers only."""
        self.limit = limit
        self.used = 0
        """Bytes of the arrays kept."""
        self._values: dict[Hashable, Any] = {}
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value under `key`, made now when it is not kept; arrays have `nbytes`, all else counts as nothing."""
        if key in self._values:
            return self._values[key]
        value = make()
        size = int(getattr(value, "nbytes", 0))
        with self._lock:
            if self.used + size <= self.limit:
                self.used += size
                self._values[key] = value
        return value

    def latest(self, key: Hashable, tag: Hashable, make: Callable[[], Value]) -> Value:
        """Like `get` for what depends on genes: only the value of the last `tag` is kept, outside of the limit."""
        held = self._values.get(key)
        if held is None or held[0] != tag:
            held = self._values[key] = (tag, make())
        return held[1]
