"""The models that a recipe may name, opened once each."""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from llmevo.errors import SourceError
from llmevo.models.adapters import LoraModel
from llmevo.models.architecture import check_compatible, check_layers, text_config
from llmevo.models.cards import excerpt
from llmevo.models.checkpoints import Checkpoint, Source, read_object
from llmevo.models.files import WHOLE, content_checksums, ends_checksum
from llmevo.models.references import ModelReference, folder_of
from llmevo.models.towers import Tower, fit

LICENCE = re.compile(r"^license:\s*(\S+)", re.MULTILINE)


Excludes = Callable[[ModelReference, str], bool]
"""Whether a user leaves a tensor of a model out on purpose."""


class Sources:
    """The models that a recipe may name, opened once each. Adapters on one model share its checkpoint.

    With a `base` every model has that one's tensors under that one's names: see `models.towers`.
    """

    def __init__(self, root: Path = Path(), base: Path | None = None, excludes: Excludes | None = None) -> None:
        """Relative references start at `root`; `base` is the folder of the model whose tensors results have.

        `excludes` says whether the user leaves a tensor of a model out on purpose.
        """
        self.root, self.base = root, base
        self._excludes = excludes
        self._checkpoints: dict[Path, Checkpoint] = {}
        self._own: dict[ModelReference, Source] = {}
        self._sources: dict[ModelReference, Source] = {}
        self._depths: dict[ModelReference, int] = {}

    @classmethod
    def open(cls, references: Iterable[ModelReference], root: Path = Path(), excludes: Excludes | None = None) -> Self:
        """Open all of them; the first is the base. Raises SourceError unless every tensor has a place in the result, or
        may be left out: see `models.towers.fit`.
        """
        known = [*references]
        sources = cls(root, excludes=excludes)
        sources.base = sources.folder(known[0]) if known else None
        sources.check(known)
        return sources

    def check(self, references: Iterable[ModelReference]) -> None:
        """Raise SourceError unless the models have the same tensors in the same shapes, those of the first one."""
        known = [*references]
        for place, other in enumerate(known):
            if place == 0 or self._known_config(other):  # only the donor's config is needed for merging
                self.depth(other)
            one, source = known[0], self[other]
            configs = self._described(one), self._described(other)
            try:
                check_compatible(str(one), self[one].shapes, str(other), source.shapes, configs)
            except SourceError as error:
                if isinstance(source, Tower) and source.fit.predicts:
                    raise SourceError(
                        f"{error}. Or make {other} the base, whose tensors the result has; or, in a recipe, give it the"
                        " weight 0 for them by a filter"
                    ) from error
                raise

    def _described(self, reference: ModelReference) -> dict[str, Any]:
        """Return the language model's config, to explain a difference."""
        config = self._known_config(reference)
        kind = {} if isinstance(self[reference], Tower) else {"model_type": config.get("model_type")}
        return {**{key: value for key, value in text_config(config).items() if key != "model_type"}, **kind}

    def _known_config(self, reference: ModelReference) -> dict[str, Any]:
        """Return the model's own config, or an empty one where it cannot be read."""
        try:
            return self.own_config(reference)
        except SourceError:
            return {}

    def folder(self, reference: ModelReference) -> Path:
        """Return the folder with the model's config and tokenizer."""
        return folder_of(reference.model, self.root)

    def __getitem__(self, reference: ModelReference) -> Source:
        """Return a model's weights, those of a `Tower` if its tensors are not those of the base."""
        if reference not in self._sources:
            own = self.own(reference)
            if self.base is not None and own.shapes != (base := self._checkpoint(self.base)).shapes:
                config = self._known_config(reference)
                excluded = partial(self._excludes, reference) if self._excludes else lambda _: False
                described = (self.base.name, base, read_object(self.base / "config.json"))
                found = fit(described, (str(reference), own, config), excluded)
                own = Tower(own, base, found) if found else own
            self._sources[reference] = own
        return self._sources[reference]

    def _checkpoint(self, folder: Path) -> Checkpoint:
        if folder not in self._checkpoints:
            self._checkpoints[folder] = Checkpoint(folder)
        return self._checkpoints[folder]

    def own(self, reference: ModelReference) -> Source:
        """Return a model's weights as they are on disk."""
        if reference not in self._own:
            folder = self.folder(reference)
            if (config := folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
                base = read_object(config).get("base_model_name_or_path") or "MODEL"
                raise SourceError(
                    f"{reference} is a LoRA adapter, not a model (it has {config.name} and no config.json); write the"
                    f" model it was trained on before it: {base}+{reference}"
                )
            checkpoint = self._checkpoint(folder)
            adapter = folder_of(reference.lora, self.root) if reference.lora else None
            self._own[reference] = LoraModel(checkpoint, adapter) if adapter else checkpoint
        return self._own[reference]

    def layout(self, reference: ModelReference) -> Path:
        """Return the folder whose config describes the tensors of `self[reference]`: the model's, or the base's."""
        if self.base is not None and isinstance(self[reference], Tower):
            return self.base
        return self.folder(reference)

    def left_out(self, reference: ModelReference) -> Mapping[str, str]:
        """Return the tensors of a model that no result has, with the reason for each."""
        source = self[reference]
        derived = dict.fromkeys(source.derived, "the config determines them")
        return {**derived, **(source.fit.left_out if isinstance(source, Tower) else {})}

    def lent(self, reference: ModelReference) -> Mapping[str, str]:
        """Return the tensors that a model has from the base, with the part of the base that each belongs to."""
        source = self[reference]
        return source.fit.lent if isinstance(source, Tower) else {}

    def config(self, reference: ModelReference) -> dict[str, Any]:
        """Return the config.json that describes `self[reference]`. Raises SourceError when it cannot be read."""
        return self._read_config(reference, self.layout(reference))

    def own_config(self, reference: ModelReference) -> dict[str, Any]:
        """Return the model's own config.json. Raises SourceError when it cannot be read."""
        return self._read_config(reference, self.folder(reference))

    def _read_config(self, reference: ModelReference, folder: Path) -> dict[str, Any]:
        return read_object(folder / "config.json", f"{reference} must be a folder that transformers has saved")

    def depth(self, reference: ModelReference) -> int:
        """Return the number of layers. Raises SourceError where config.json has none, or the weights differ."""
        if reference not in self._depths:
            config, shapes = self.own_config(reference), self.own(reference).shapes
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
