"""What a check finds, and the models as it goes through them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmevo.models.references import ModelReference
from llmevo.run.scorer import Scorer


@dataclass(frozen=True)
class Finding:
    """Something about the models that a search should not begin with unseen. Never an error: people may mean it."""

    model: str
    """As the genes call it."""
    what: str
    """What is the matter, with its value."""
    remedy: str
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.model}: {self.what}. {self.remedy}."


Findings = Iterator[Finding]


def names(scorer: Scorer) -> dict[ModelReference, str]:
    """Every model of the search by the name that the genes have for it, the donor of the config first."""
    known = scorer.space.names
    return {reference: known.get(reference) or reference.name for reference in scorer.config.genome.references}


def folders(scorer: Scorer) -> list[tuple[str, ModelReference, Path]]:
    """Every model folder once, with its first model: adapters of one model share its config and tokenizer."""
    found: dict[Path, tuple[str, ModelReference, Path]] = {}
    for reference, name in names(scorer).items():
        folder = scorer.sources.folder(reference)
        plain = name if reference.lora is None else reference.model.name
        if folder not in found:
            found[folder] = (plain, reference, folder)
    return [*found.values()]


def tokenizer_donor(scorer: Scorer) -> tuple[str, Path]:
    """Whose tokenizer all candidates have: its name and folder."""
    donor = scorer.space.decode(scorer.space.uniform()).tokenizer_donor
    folder = scorer.sources.folder(donor)
    return next((name for name, _, other in folders(scorer) if other == folder), donor.name), folder
