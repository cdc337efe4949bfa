"""What tasks are called where there is little room, and which of two lists go together."""

from collections.abc import Sequence

SETS = {"train", "training", "search", "dev", "val", "valid", "validation", "test", "eval", "heldout", "held", "out"}
"""Words at the end of a task's name that say which of its questions are asked."""


def short(names: Sequence[str]) -> list[str]:
    """Task names without the words that all of them begin or end with: what tells them apart."""
    words = [name.split("_") for name in names]
    if len(words) < 2:
        return [*names]
    while all(len(word) > 1 for word in words) and len({word[0] for word in words}) == 1:
        words = [word[1:] for word in words]
    while all(len(word) > 1 for word in words) and len({word[-1] for word in words}) == 1:
        words = [word[:-1] for word in words]
    return ["_".join(word) for word in words]


def stem(name: str) -> str:
    words = name.split("_")
    while len(words) > 1 and words[-1] in SETS:
        words.pop()
    return "_".join(words)
