"""How long a prompt may be, and what is left out of it first."""

import math
import re
from dataclasses import dataclass

TOKENS = 6000
"""Of a whole prompt, at most: it does not grow with trials, genes, tasks, models or the length of texts."""


PIECE = re.compile(r"[A-Za-z]+|[^\W_A-Za-z]|\n+|[^\S\n]+(?=[^A-Za-z])|[^\w\s]|_")
"""Words; digits and letters of other scripts; ends of lines; spaces that no word takes with it; signs."""


def tokens(text: str) -> int:
    """An estimate from above of what a text takes: a token for every digit and sign, and for four letters of a word.

    Tokenizers that join digits, or spaces with what follows, take less.
    """
    return sum(_tokens(piece) for piece in PIECE.findall(text))


def _tokens(piece: str) -> int:
    if not piece.isascii():
        return len(piece.encode())
    return math.ceil(len(piece) / 4) if piece[0].isalpha() else 1


@dataclass(frozen=True)
class Detail:
    """How much a prompt shows."""

    rows: int = 12
    """Recipes with their scores, the contrasts among them."""
    contrasts: int = 4
    effects: int = 64
    interactions: int = 5
    suggestions: int = 3
    cosines: int = 60
    """Of all slices together; the norms stay as long as any cosines do."""
    failures: int = 3
    reason: int = 160
    """Characters of a reason."""
    tasks: int = 12
    """Tasks whose scores are shown; of more, those that count most."""
    models: int = 16
    """Models whose scores alone are shown; of more, the best."""
    names: int = 40
    """Characters of a name."""


DETAILS = (
    Detail(),
    Detail(names=28, cosines=24),
    Detail(interactions=3, cosines=24, effects=32, tasks=8, reason=100, names=28),
    Detail(10, 3, 24, 3, 3, 12, 2, 80, 6, 12, 24),
    Detail(8, 3, 16, 3, 2, 12, 2, 80, 5, 8, 24),
    Detail(6, 2, 12, 2, 2, 0, 2, 60, 4, 8, 20),
    Detail(4, 1, 8, 1, 1, 0, 1, 40, 3, 6, 16),
    Detail(2, 0, 0, 0, 1, 0, 1, 40, 2, 4, 16),
)
"""From the fullest to the barest; the first that fits is used."""
