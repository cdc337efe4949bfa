"""A run that Ctrl-C stops."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

from llmevo.run.scorer import Scorer


@contextmanager
def interrupted_at(scoring: int) -> Generator[None]:
    """Raise KeyboardInterrupt at the n-th scoring, counted from 0."""
    real, left = Scorer.score, [scoring]

    def score(scorer: Scorer, *words: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(scorer, *words, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "score", score)
        yield
