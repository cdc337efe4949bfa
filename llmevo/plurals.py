"""Counted things in words."""


def plural(count: int, noun: str, nouns: str = "") -> str:
    """`1 question`, `2 questions`, `1,200 questions`; `nouns` is the plural where it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"
