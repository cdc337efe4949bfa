"""What a preparation measures of the inputs of a model's linear layers, kept in the cache folder."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llmevo.errors import RecipeError
from llmevo.merging.preparation.registry import Measured
from llmevo.merging.preparation.texts import Texts
from llmevo.models.checkpoints import Checkpoint
from llmevo.models.files import cache_folder
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources

RULES = 1
"""Raised by every change of how it is measured."""


@dataclass(frozen=True)
class Sequential:
    """The merge that the layers below a measured one are: a step's, with weights 1."""

    step: str
    parameters: Mapping[str, float]
    base: ModelReference
    read_by: Mapping[ModelReference, Texts]
    """The experts, and the texts of each."""
    checksums: Sequence[str]
    """Of the base and the experts."""

    @property
    def made_of(self) -> list[object]:
        """All that decides the merge."""
        texts = [of.digest for of in self.read_by.values()]
        return [self.step, dict(self.parameters), [*self.checksums], texts]


@dataclass(frozen=True)
class Measurement:
    """The inputs of the linear layers of one model on some texts."""

    kind: Measured
    model: ModelReference
    checksum: str
    texts: Texts
    sequential: Sequential | None = None
    """What the layers below are instead of the model's own."""

    @classmethod
    def of(
        cls, kind: Measured, model: ModelReference, sources: Sources, texts: Texts, sequential: Sequential | None = None
    ) -> "Measurement":
        return cls(kind, model, sources.checksum(model), texts, sequential)

    @property
    def folder(self) -> Path:
        """Where it is kept: {weight: its input} in one file."""
        made = [RULES, self.kind, self.checksum, self.texts.digest]
        if self.sequential:
            made += self.sequential.made_of
        return cache_folder() / "activations" / hashlib.sha256(json.dumps(made).encode()).hexdigest()[:24]

    def open(self) -> Checkpoint:
        """Open it. Raises RecipeError where it has not been made."""
        if not self.folder.exists():
            raise RecipeError(
                f"prepare: the inputs of {self.model} on the texts are not measured; `llmevo.merge` and runs do so"
            )
        return Checkpoint(self.folder)


def open_all(measurements: Mapping[str, Sequence[Measurement]]) -> Mapping[str, Sequence[Checkpoint]]:
    """Open the measurements of each step."""
    return {step: [each.open() for each in every] for step, every in measurements.items()}


def of_weight(name: str, files: Sequence[Checkpoint]) -> list[Tensor] | None:
    """Return what was measured of one weight's input; None for a weight of no linear layer."""
    return [file.tensor(name) for file in files] if all(name in file.shapes for file in files) else None
