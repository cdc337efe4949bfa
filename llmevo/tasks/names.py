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


def paired(searched: Sequence[str], heldout: Sequence[str]) -> dict[str, str]:
    """{search task: its held-out task}: of the same name, or of the same short one; the only two of their lists; or of
    the same name but for the words for a set (`arc_easy_train` and `arc_easy`, `sums` and `sums_heldout`).
    """
    if len(searched) == len(heldout) == 1:
        return {searched[0]: heldout[0]}
    called = {**dict(zip(short(heldout), heldout, strict=True)), **{name: name for name in heldout}}
    names = {name: name if name in called else shown for name, shown in zip(searched, short(searched), strict=True)}
    found = {name: called[shown] for name, shown in names.items() if shown in called}
    stems = {_stem(other): other for other in reversed(heldout) if other not in found.values()}
    return {**{name: stems[_stem(name)] for name in searched if _stem(name) in stems}, **found}


def _stem(name: str) -> str:
    words = name.split("_")
    while len(words) > 1 and words[-1] in SETS:
        words.pop()
    return "_".join(words)
