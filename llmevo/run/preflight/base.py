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


def names(rig: Scorer) -> dict[ModelReference, str]:
    """Every model of the search by the name that the genes have for it, the donor of the config first."""
    known = rig.space.names
    return {reference: known.get(reference) or reference.name for reference in rig.config.genome.references}


def folders(rig: Scorer) -> list[tuple[str, ModelReference, Path]]:
    """Every model folder once, with its first model: adapters of one model share its config and tokenizer."""
    found: dict[Path, tuple[str, ModelReference, Path]] = {}
    for reference, name in names(rig).items():
        folder = rig.sources.folder(reference)
        plain = name if reference.lora is None else reference.model.name
        if folder not in found:
            found[folder] = (plain, reference, folder)
    return [*found.values()]


def tokenizer_donor(rig: Scorer) -> tuple[str, Path]:
    """Whose tokenizer all candidates have: its name and folder."""
    donor = rig.space.decode(rig.space.uniform()).tokenizer_donor
    folder = rig.sources.folder(donor)
    return next((name for name, _, other in folders(rig) if other == folder), donor.name), folder
