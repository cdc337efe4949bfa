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
from llmevo.models.checkpoints import Checkpoint, Source, read_object, weight_files
from llmevo.models.files import WHOLE, content_checksums, ends_checksum
from llmevo.models.placeholder import placeholder
from llmevo.models.quantized_checkpoint import CONFIG_KEYS, QuantizedCheckpoint, quantization_of
from llmevo.models.references import ModelReference, folder_of

LICENCE = re.compile(r"^license:\s*(\S+)", re.MULTILINE)


class Sources:
    """The models that a recipe may name, opened once each. Adapters on one model share its checkpoint."""

    def __init__(self, root: Path = Path()) -> None:
        self.root = root
        self._checkpoints: dict[Path, Source] = {}
        self._sources: dict[ModelReference, Source] = {}
        self._depths: dict[ModelReference, int] = {}

    @classmethod
    def open(cls, references: Iterable[ModelReference], root: Path = Path()) -> Self:
        """Open all of them. Raises SourceError unless they have the same tensors in the same shapes."""
        sources = cls(root)
        known = [*references]
        for place, other in enumerate(known):
            one, shapes = known[0], sources[other].shapes
            if place == 0 or sources._known_config(other):  # only the donor's config is needed for merging
                sources.depth(other)
            configs = sources._known_config(one), sources._known_config(other)
            check_compatible(str(one), sources[one].shapes, str(other), shapes, configs)
        return sources

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
            checkpoint = self._checkpoint(folder)
            adapter = folder_of(reference.lora, self.root) if reference.lora else None
            self._sources[reference] = LoraModel(checkpoint, adapter) if adapter else checkpoint
        return self._sources[reference]

    def _checkpoint(self, folder: Path) -> Source:
        if folder not in self._checkpoints:
            given = quantization_of(folder)
            self._checkpoints[folder] = QuantizedCheckpoint(folder, given) if given else Checkpoint(folder)
        return self._checkpoints[folder]

    def config(self, reference: ModelReference) -> dict[str, Any]:
        """Return the model's config.json, without a quantization: merges are not quantized.

        Raises SourceError when it cannot be read.
        """
        file = self.folder(reference) / "config.json"
        config = read_object(file, f"{reference} must be a folder that transformers has saved")
        return {key: value for key, value in config.items() if key not in CONFIG_KEYS}

    def engine_folder(self, reference: ModelReference) -> Path:
        """Return a folder that engines can start from: the model's own, or one without its quantization.

        An engine replaces all weights before it answers, so the latter has zeros.
        """
        folder = self.folder(reference)
        source = self._checkpoint(folder)
        if isinstance(source, Checkpoint) and not source.is_pickled:
            return folder
        dtypes = {name: source.dtype(name) for name in source.shapes}
        return placeholder(self.config(reference), source.shapes, dtypes)

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
        folder = self.folder(reference)
        files = _weights_in(folder)
        if quantization_of(folder):  # it says how the weights are read
            files += [*folder.glob("config.json"), *folder.glob("hf_quant_config.json")]
        if reference.lora:
            adapter = folder_of(reference.lora, self.root)
            files += [*_weights_in(adapter, "adapter_model*.safetensors"), *adapter.glob("adapter_config.json")]
        return files


def _weights_in(folder: Path, pattern: str = "model*.safetensors") -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or weight_files(folder, pattern)
