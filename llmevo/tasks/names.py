"""What tasks are called where there is little room, and which of two lists go together."""

from collections.abc import Sequence


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
    """{search task: its held-out task}: of the same name, or of the same short one; the only two of their lists."""
    if len(searched) == len(heldout) == 1:
        return {searched[0]: heldout[0]}
    called = {**dict(zip(short(heldout), heldout, strict=True)), **{name: name for name in heldout}}
    names = {name: name if name in called else shown for name, shown in zip(searched, short(searched), strict=True)}
    return {name: called[shown] for name, shown in names.items() if shown in called}
