"""The interface of an engine."""

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

    def swap(self, recipe: Recipe, quantize: str = "") -> object:
        """Merge a recipe into the running model; weights that would not change are not loaded again.

        With `quantize`, a format of `models.quantize`, the weights are rounded as a server of that format has them.
        Raises CandidateError if the recipe cannot be merged or does not fit. A swap that fails halfway leaves weights
        of two candidates in the model; the next swap replaces all of them.
        """
        ...

    def differences(self, folder: Path) -> Sequence[str]:
        """The differences between the running model and the exported one in `folder`; empty if they agree."""
        ...

    def close(self) -> None:
        """Free the model and end its processes."""
        ...
