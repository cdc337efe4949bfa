"""The lines above a recipe that llmevo wrote, which determine its weights together with the recipe."""

import re
from dataclasses import dataclass
from typing import Self

from llmevo.merging.recipe import Recipe

PROVENANCE = re.compile(r"^# llmevo: seed (-?\d+)(?:, masks ([^\s,]+))?(, rows of tokens)?$", re.MULTILINE)


@dataclass(frozen=True)
class Provenance:
    """The comments above a recipe that llmevo wrote: they determine its weights together with the recipe."""

    seed: int
    """The seed of random masks."""
    masks: str | None = None
    """A file in the recipe's folder with the seed of every mask, where its models may get other names."""
    trims: bool = False
    """Whether rows of the embeddings beyond the last token are cut off; a scored model has all."""
    changed: bool = False
    """Whether a model has changed since the merge was scored."""

    def sign(self, recipe: Recipe) -> str:
        """Return the recipe as YAML, with these lines above it."""
        masks = f", masks {self.masks}" if self.masks else ""
        model = "the model that was written" if self.trims else "the model that was scored"
        makes = "a model of this" if self.changed else f"of this {model}, bit for bit"
        head = f"# `llmevo merge` makes {makes}; {recipe.mergekit_clause}."
        rows = ", rows of tokens" if self.trims else ""
        return f"{head}\n# llmevo: seed {self.seed}{masks}{rows}\n{recipe.to_yaml()}"

    @classmethod
    def of(cls, text: str) -> Self | None:
        """Read these lines of a recipe; None for one that llmevo did not write."""
        found = PROVENANCE.search(text)
        return cls(int(found[1]), found[2], bool(found[3])) if found else None
