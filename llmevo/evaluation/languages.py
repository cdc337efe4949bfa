"""The language of a text, by py3langid: offline, of 139 languages, and the same every time.

Names, numbers and code are in no language, and a few words may be in many. So only words that begin with a small letter
count (or in a script without such), a text needs some of them, and the identifier has to be sure: see `LEAST`, `SURE`.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

LEAST = 48
"""Bytes of such words that a text needs."""


SURE = 0.5
"""The probability from which on a text is in a language, among 139 of which many are alike."""


UNLIKELY = 0.05
"""The probability below which it is not."""


NONE = "zxx"
"""ISO 639 for what is not in a language."""


def languages_of(texts: Iterable[str]) -> frozenset[str]:
    """The ISO 639 codes of the languages that these texts are in, one by one, or all together where they are short."""
    read = [*texts]
    told = (_probabilities(text) for text in (*read, " ".join(read)))
    return frozenset(code for found in told for code, chance in found.items() if chance >= SURE) - {NONE}


def foreign(text: str, known: frozenset[str]) -> str:
    """The ISO 639 code of the language a text is in, if it surely is in one and in none of the known; else nothing.
    Where none is known, none is foreign.
    """
    found = _probabilities(text)
    code = max(found, key=lambda code: found[code], default=NONE)
    if not known or code == NONE or found[code] < SURE:
        return ""
    return code if sum(found.get(one, 0.0) for one in known) < UNLIKELY else ""


def _probabilities(text: str) -> dict[str, float]:
    """Of every language; of none where there is too little to tell by."""
    words = [word for word in text.split() if not next(filter(str.isalpha, word), "A").isupper()]
    told = " ".join(words)
    return dict(_identifier().rank(told)) if len(told.encode()) >= LEAST else {}


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # reads 5 MB

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
