"""A finding of the checks, and the models in the order in which the checks visit them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmevo.models.references import ModelReference
from llmevo.run.scorer import Scorer


@dataclass(frozen=True)
class Finding:
    """A warning before a search. Never an error, for it may be meant."""

    model: str
    """The model's name in the genes, or the place in the config."""
    what: str
    """The fact, with its value."""
    remedy: str

    def __str__(self) -> str:
        return f"{self.model}: {self.what}. {self.remedy}."


Findings = Iterator[Finding]


def names(scorer: Scorer) -> dict[ModelReference, str]:
    """Every model of the search with its name in the genes, the donor of the config first."""
    known = scorer.space.names
    return {reference: known.get(reference) or reference.name for reference in scorer.config.genome.references}


def folders(scorer: Scorer) -> list[tuple[str, ModelReference, Path]]:
    """Every model folder once, with its first model: adapters of one model share its config and tokenizer."""
    found: dict[Path, tuple[str, ModelReference, Path]] = {}
    for reference, name in names(scorer).items():
        folder = scorer.sources.folder(reference)
        plain = name if reference.lora is None else reference.model.name
        found.setdefault(folder, (plain, reference, folder))
    return [*found.values()]


def tokenizer_donor(scorer: Scorer) -> tuple[str, Path]:
    """The name of the model whose tokenizer all candidates have, and the folder of that tokenizer with their tokens."""
    donor = scorer.space.decode(scorer.space.uniform()).tokenizer_donor
    folder = scorer.sources.folder(donor)
    name = next((name for name, _, other in folders(scorer) if other == folder), donor.name)
    return name, scorer.tokenizer_folder
