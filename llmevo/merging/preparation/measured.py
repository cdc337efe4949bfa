"""What a preparation measures of the inputs of a model's linear layers, kept in the cache folder."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llmevo.errors import RecipeError, SourceError
from llmevo.merging.preparation.registry import Measured
from llmevo.merging.preparation.texts import Texts
from llmevo.merging.vocabulary import ByToken, plain, tokenizer_folder
from llmevo.models.checkpoints import Checkpoint
from llmevo.models.files import cache_folder, content_checksums
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.models.tokenizer import tokenizer_files

RULES = 2
"""Raised by every change of how it is measured."""


def reading(sources: Sources, *models: ModelReference) -> str:
    """Return a digest of what decides, beside their weights, how models read texts: their configs and tokenizers, and
    the numbers of the tokens where these are the merge's own.

    Raises SourceError for a file that cannot be read.
    """
    made: list[object] = [sources.vocabulary.digest] if isinstance(sources, ByToken) else []
    for model in dict.fromkeys(models):
        folder = tokenizer_folder(model, plain(sources))
        files = [file for file in tokenizer_files(folder) if file.is_file()]
        try:
            checksums = content_checksums(files)
        except OSError as error:
            raise SourceError(f"{model}: cannot be read ({error})") from error
        made.append([sources.config(model), [(file.name, checksums[file]) for file in files]])
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


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
    reading: str
    """How they read texts: see `reading`."""

    @property
    def made_of(self) -> list[object]:
        """All that decides the merge."""
        texts = [of.digest for of in self.read_by.values()]
        return [self.step, dict(self.parameters), [*self.checksums], texts, self.reading]


@dataclass(frozen=True)
class Measurement:
    """The inputs of the linear layers of one model on some texts."""

    kind: Measured
    model: ModelReference
    checksum: str
    reading: str
    """How the base, whose config it has, the model, and the one whose tokenizer the merge has, read texts: see
    `reading`."""
    texts: Texts
    sequential: Sequential | None = None
    """What the layers below are instead of the model's own."""

    @property
    def folder(self) -> Path:
        """Where it is kept: {weight: its input} in one file."""
        made = [RULES, self.kind, self.checksum, self.reading, self.texts.digest]
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
