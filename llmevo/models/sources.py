"""The models that a recipe may name, opened once each."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from llmevo.errors import SourceError
from llmevo.models.adapters import LoraModel
from llmevo.models.architecture import check_compatible, check_layers
from llmevo.models.cards import excerpt
from llmevo.models.checkpoints import Checkpoint, Source, read_object
from llmevo.models.files import WHOLE, content_checksums, ends_checksum
from llmevo.models.references import ModelReference, folder_of
from llmevo.models.tokenizer import VOCABULARY

LICENCE = re.compile(r"^license:\s*(\S+)", re.MULTILINE)


class Sources:
    """The models that a recipe may name, opened once each. Adapters on one model share its checkpoint."""

    def __init__(self, root: Path = Path()) -> None:
        self.root = root
        self._checkpoints: dict[Path, Checkpoint] = {}
        self._sources: dict[ModelReference, Source] = {}
        self._depths: dict[ModelReference, int] = {}

    @classmethod
    def open(cls, references: Iterable[ModelReference], root: Path = Path()) -> Self:
        """Open all of them. Raises SourceError unless they have the same tensors in the same shapes."""
        sources = cls(root)
        sources.check(references)
        return sources

    def check(self, references: Iterable[ModelReference], rows: bool = True) -> None:
        """Raise SourceError unless the models have the same tensors in the same shapes.

        Without `rows`, weights with one row a token may have other numbers of rows.
        """
        known = [*references]
        for place, other in enumerate(known):
            one, first, second = known[0], self[known[0]].shapes, self[other].shapes
            if not rows:
                first, second = (
                    {n: s for n, s in each.items() if not VOCABULARY.search(n)} for each in (first, second)
                )
            if place == 0 or self._known_config(other):  # only the donor's config is needed for merging
                self.depth(other)
            configs = self._known_config(one), self._known_config(other)
            check_compatible(str(one), first, str(other), second, configs)

    def _known_config(self, reference: ModelReference) -> dict[str, Any]:
        """Return the model's config, or an empty one where it cannot be read."""
        try:
            return self.config(reference)
        except SourceError:
            return {}

    def folder(self, reference: ModelReference) -> Path:
        """Return the folder with the model's config and tokenizer."""
        return folder_of(reference.model, self.root)

    def __getitem__(self, reference: ModelReference) -> Source:
        if reference not in self._sources:
            folder = self.folder(reference)
            if (config := folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
                base = read_object(config).get("base_model_name_or_path") or "MODEL"
                raise SourceError(
                    f"{reference} is a LoRA adapter, not a model (it has {config.name} and no config.json); write the"
                    f" model it was trained on before it: {base}+{reference}"
                )
            checkpoint = self._checkpoints.get(folder) or Checkpoint(folder)
            self._checkpoints[folder] = checkpoint
            adapter = folder_of(reference.lora, self.root) if reference.lora else None
            self._sources[reference] = LoraModel(checkpoint, adapter) if adapter else checkpoint
        return self._sources[reference]

    def config(self, reference: ModelReference) -> dict[str, Any]:
        """Return the model's config.json. Raises SourceError when it cannot be read."""
        file = self.folder(reference) / "config.json"
        return read_object(file, f"{reference} must be a folder that transformers has saved")

    def depth(self, reference: ModelReference) -> int:
        """Return the number of layers. Raises SourceError where config.json has none, or the weights differ."""
        if reference not in self._depths:
            config, shapes = self.config(reference), self[reference].shapes
            try:
                self._depths[reference] = check_layers(config, shapes)
            except SourceError as error:
                raise SourceError(f"{reference}: {error}") from error
        return self._depths[reference]

    def licence(self, reference: ModelReference) -> str | None:
        """Return the licence that the adapter's card, or the model's, declares."""
        folders = [folder_of(reference.lora, self.root)] if reference.lora else []
        for folder in [*folders, self.folder(reference)]:
            card = folder / "README.md"
            found = LICENCE.search(card.read_text(errors="replace")) if card.is_file() else None
            if found:
                return found[1]
        return None

    def card(self, reference: ModelReference) -> str:
        """Return an excerpt of the adapter's card, or else of the model's; empty without one."""
        folders = [folder_of(reference.lora, self.root)] if reference.lora else []
        return next(filter(None, map(excerpt, [*folders, self.folder(reference)])), "")

    def checksum(self, reference: ModelReference, recorded: str = WHOLE) -> str:
        """Return a digest of all files that determine the weights, by the rule of a recorded one (of 0.1, or today's).

        Reads the files, unless `content_checksums` remembers their checksums. Raises SourceError.
        """
        try:
            files = self.files(reference)
            if not recorded.startswith(WHOLE):
                weights = [file for file in files if file.suffix == ".safetensors"]
                return hashlib.sha256("".join(map(ends_checksum, weights)).encode()).hexdigest()
            digests = content_checksums(files)
        except OSError as error:
            raise SourceError(f"{reference}: cannot be read ({error})") from error
        parts = [f"{file.name} {digests[file]}" for file in files]
        return WHOLE + hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def files(self, reference: ModelReference) -> list[Path]:
        """Return the files that determine the model's weights."""
        files = sorted(self.folder(reference).glob("*.safetensors"))
        if reference.lora:
            adapter = folder_of(reference.lora, self.root)
            files += [*sorted(adapter.glob("*.safetensors")), *adapter.glob("adapter_config.json")]
        return files
