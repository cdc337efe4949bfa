"""What an engine is."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llmevo.merging.recipe import Recipe

if TYPE_CHECKING:  # lm-eval is slow to import
    from lm_eval.api.model import LM


class Engine(Protocol):
    """One model in memory whose weights are replaced again and again."""

    @property
    def lm(self) -> "LM":
        """The live model as lm-eval sees it."""
        ...

    def swap(self, recipe: Recipe) -> object:
        """Merge a recipe into the running model; weights that would not change are left as they are.

        Raises CandidateError when it cannot be merged or does not fit. A swap that fails halfway leaves weights of two
        candidates; the next one mends that.
        """
        ...

    def differences(self, folder: Path) -> Sequence[str]:
        """What differs between the running model and an exported one in `folder`; nothing when all is well."""
        ...

    def close(self) -> None:
        """Let go of the model and of any process that holds it."""
        ...
