"""The first lines of a recipe that llmevo wrote: what besides the recipe decides its weights.

They are comments of YAML: mergekit reads the file as any other.
"""

import re
from dataclasses import dataclass
from typing import Self

from llmevo.merging.recipe import Recipe

LINE = re.compile(r"^# llmevo: seed (-?\d+)(?:, masks (\S+))?$", re.MULTILINE)


@dataclass(frozen=True)
class Provenance:
    """How the model was merged that was scored."""

    seed: int
    """Of random masks."""
    masks: str | None = None
    """A file beside the recipe with the seed of every mask, where its models may get other names."""

    def sign(self, recipe: Recipe) -> str:
        """The recipe as YAML, with this above it."""
        masks = f", masks {self.masks}" if self.masks else ""
        head = "# `llmevo merge` makes of this the model that was scored, bit for bit; mergekit reads it too."
        return f"{head}\n# llmevo: seed {self.seed}{masks}\n{recipe.to_yaml()}"

    @classmethod
    def of(cls, text: str) -> Self | None:
        """What a recipe's text says; None for one that llmevo did not write."""
        found = LINE.search(text)
        return cls(int(found[1]), found[2]) if found else None
