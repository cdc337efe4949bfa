"""The models that a recipe may name, opened once each."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from llmevo.errors import SourceError
from llmevo.models.adapters import LoraModel
from llmevo.models.architecture import EMBEDDINGS, HEADS, check_compatible, check_layers, computing, text_config
from llmevo.models.cards import excerpt, licence
from llmevo.models.checkpoints import Checkpoint, Source, read_object, weight_files
from llmevo.models.experts import MARK, Expert, expert_folder, mixture_of
from llmevo.models.files import WHOLE, content_checksums, ends_checksum
from llmevo.models.licences import both
from llmevo.models.placeholder import placeholder
from llmevo.models.placement import PlacedModel, fit
from llmevo.models.quantized_checkpoint import CONFIG_KEYS, QuantizedCheckpoint, quantization_of
from llmevo.models.references import ModelPath, ModelReference, folder_of
from llmevo.models.tokenizer import VOCABULARY, with_vocabulary_size
from llmevo.models.unrolled import Unrolled, is_rolled, unrolled_config

ADAPTER = "adapter_config.json"


Excludes = Callable[[ModelReference, str], bool]
"""Whether a user leaves a tensor of a model out on purpose."""


class Sources:
    """The models that a recipe may name, opened once each. Adapters on one model share its checkpoint.

    With a `base` every model has that one's tensors under that one's names: see `models.placement`.
    """

    def __init__(self, root: Path = Path(), base: Path | None = None, excludes: Excludes | None = None) -> None:
        """Relative references start at `root`; `base` is the folder of the model whose tensors results have.

        `excludes` says whether the user leaves a tensor of a model out on purpose.
        """
        self.root, self.base = root, base
        self.dense: ModelReference | None = None
        """A model that is no expert of a mixture, whose class experts have if they may."""
        self._excludes = excludes
        self._checkpoints: dict[Path, Source] = {}
        self._own: dict[ModelReference, Source] = {}
        self._sources: dict[ModelReference, Source] = {}
        self._folders: dict[ModelReference, tuple[Path, Path | None]] = {}
        self._trained_on: dict[ModelReference, ModelReference] = {}
        self._depths: dict[ModelReference, int] = {}

    @classmethod
    def open(cls, references: Iterable[ModelReference], root: Path = Path(), excludes: Excludes | None = None) -> Self:
        """Open all of them; the first is the base. Raises SourceError unless every tensor has a place in the result, or
        may be left out: see `models.placement.fit`.
        """
        known = [*references]
        sources = cls.unchecked(known, root, excludes)
        sources.check(known)
        return sources

    @classmethod
    def unchecked(
        cls, references: Iterable[ModelReference], root: Path = Path(), excludes: Excludes | None = None
    ) -> Self:
        """Like `open`, without the comparison of names and shapes: see `check`."""
        sources, known = cls(root, excludes=excludes), [*references]
        sources.dense = next((of for of in known if of.model.expert is None), None)
        sources.base = next((sources.folder(reference) for reference in known), None)
        return sources

    def check(self, references: Iterable[ModelReference], rows: bool = True) -> None:
        """Raise SourceError unless the models have the same tensors in the same shapes, those of the first one.

        Without `rows`, weights with one row a token may have other numbers of rows.
        """
        known = [*references]
        for place, other in enumerate(known):
            if place == 0 or self._known_config(other):  # only the donor's config is needed for merging
                self.depth(other)
            one, source = known[0], self[other]
            configs = self._described(one), self._described(other)
            first, second = (
                each if rows else {name: shape for name, shape in each.items() if not VOCABULARY.search(name)}
                for each in (self[one].shapes, source.shapes)
            )
            try:
                check_compatible(str(one), first, str(other), second, configs)
            except SourceError as error:
                if isinstance(source, PlacedModel) and source.fit.predicts:
                    raise SourceError(
                        f"{error}. Or make {other} the base, whose tensors the result has; or, in a recipe, give it the"
                        " weight 0 for them by a filter"
                    ) from error
                raise

    def _described(self, reference: ModelReference) -> dict[str, Any]:
        """Return the language model's config, to explain a difference."""
        config = self._known_config(reference)
        kind = {} if isinstance(self[reference], PlacedModel) else {"model_type": config.get("model_type")}
        return {**{key: value for key, value in text_config(config).items() if key != "model_type"}, **kind}

    def _known_config(self, reference: ModelReference) -> dict[str, Any]:
        """Return the model's own config, or an empty one where it cannot be read."""
        try:
            return self.own_config(reference)
        except SourceError:
            return {}

    def folder(self, reference: ModelReference) -> Path:
        """Return the folder with the model's config and tokenizer."""
        return self._places(reference)[0]

    def without_adapter(self, reference: ModelReference) -> ModelReference:
        """Return a reference without its adapter; of an adapter alone, the model that it names as its own."""
        if reference.lora:
            return ModelReference(model=reference.model)
        self._places(reference)
        return self._trained_on.get(reference, reference)

    def _places(self, reference: ModelReference) -> tuple[Path, Path | None]:
        """Return the folders of the model and of the adapter on it; an adapter alone names its model itself."""
        if reference not in self._folders:
            folder = folder_of(reference.model, self.root)
            if reference.model.expert is not None:
                folder = expert_folder(folder, reference.model.expert, str(reference.model), self._dense_kind())
            adapter = folder_of(reference.lora, self.root) if reference.lora else None
            if adapter is None and is_adapter(folder):
                (base, folder), adapter = self._base_of(reference, folder), folder
                self._trained_on[reference] = ModelReference(model=base)
            self._folders[reference] = folder, adapter
        return self._folders[reference]

    def _dense_kind(self) -> str:
        """Return the `model_type` of the dense model, or of the base; empty where there is none."""
        if self.dense:
            return str(self._known_config(self.dense).get("model_type"))
        return str(read_object(self.base / "config.json").get("model_type")) if self.base else ""

    def _base_of(self, reference: ModelReference, adapter: Path) -> tuple[ModelPath, Path]:
        """Return the model that an adapter was trained on, and its folder. Raises SourceError where it is not found."""
        config = read_object(adapter / ADAPTER)
        named = config.get("base_model_name_or_path")
        said = f"{reference} is an adapter (it has {ADAPTER} and no weights of a model)"
        write = f"write the model it was trained on before it: MODEL+{reference}"
        if not isinstance(named, str) or not named:
            raise SourceError(f"{said} and names no model (base_model_name_or_path is {named!r}); {write}")
        revision = config.get("revision")
        base = ModelPath(path=named, revision=revision if isinstance(revision, str) and revision else None)
        try:
            folder = folder_of(base, self.root)
        except SourceError as error:
            raise SourceError(
                f"{said}, and its model {named} (base_model_name_or_path) cannot be found ({error}); {write}"
            ) from error
        if is_adapter(folder):
            raise SourceError(f"{said} on another adapter ({named}); merge that into its model first")
        return base, folder

    def __getitem__(self, reference: ModelReference) -> Source:
        """Return a model's weights, those of a `PlacedModel` if its tensors are not those of the base."""
        if reference not in self._sources:
            own = self.own(reference)
            if self.base is not None and own.shapes != (base := self._checkpoint(self.base)).shapes:
                config = self._known_config(reference)
                excluded = partial(self._excludes, reference) if self._excludes else lambda _: False
                described = (self.base.name, base, read_object(self.base / "config.json"))
                found = fit(described, (str(reference), own, config), excluded)
                own = PlacedModel(own, base, found) if found else own
            self._sources[reference] = own
        return self._sources[reference]

    def own(self, reference: ModelReference) -> Source:
        """Return a model's weights under their own names."""
        if reference not in self._own:
            folder, adapter = self._places(reference)
            model = self._checkpoint(folder)
            self._own[reference] = LoraModel(model, adapter, str(folder)) if adapter else model
        return self._own[reference]

    def layout(self, reference: ModelReference) -> Path:
        """Return the folder whose config describes the tensors of `self[reference]`: the model's, or the base's."""
        if self.base is not None and isinstance(self[reference], PlacedModel):
            return self.base
        return self.folder(reference)

    def left_out(self, reference: ModelReference) -> Mapping[str, str]:
        """Return the tensors of a model that no result has, with the reason for each."""
        source = self[reference]
        return {**source.derived, **(source.fit.left_out if isinstance(source, PlacedModel) else {})}

    def lent(self, reference: ModelReference) -> Mapping[str, str]:
        """Return the tensors that a model has from the base, with the part of the base that each belongs to."""
        source = self[reference]
        return source.fit.lent if isinstance(source, PlacedModel) else {}

    def model(self, reference: ModelReference) -> Source:
        """Return the model's weights, without those of an adapter on it."""
        return self._checkpoint(self.folder(reference))

    def _checkpoint(self, folder: Path) -> Source:
        """Return the weights in a folder, opened once whatever path leads to it."""
        place = folder.resolve()
        if place not in self._checkpoints:
            if of := mixture_of(folder):
                mixture = read_object(of[0] / "config.json")
                whole = of[0].resolve()
                self._checkpoints[place] = Expert(self._checkpoint(whole), mixture, of[1], str(whole))
                return self._checkpoints[place]
            given = quantization_of(folder)
            source = QuantizedCheckpoint(folder, given) if given else Checkpoint(folder)
            try:
                config = read_object(folder / "config.json")
            except SourceError:  # said where the config is needed
                config = {}
            if isinstance(source, Checkpoint):
                _leave_out_tied_head(source, config)
            self._checkpoints[place] = Unrolled(source, config, str(folder)) if is_rolled(config) else source
        return self._checkpoints[place]

    def config(self, reference: ModelReference) -> dict[str, Any]:
        """Return the config.json that describes `self[reference]`, without a quantization: merges are not quantized.

        Raises SourceError when it cannot be read.
        """
        config, rows = self._read_config(reference, self.layout(reference)), self._own_rows(reference)
        return with_vocabulary_size(config, rows) if rows else config

    def _own_rows(self, reference: ModelReference) -> int:
        """Return the number of rows of the embeddings where an adapter changes it; else 0."""
        if self._places(reference)[1] is None:
            return 0
        shapes, before = self.own(reference).shapes, self.model(reference).shapes
        tables = [name for name in shapes if EMBEDDINGS.search(name)]
        return next((shapes[name][0] for name in tables if name in before and shapes[name] != before[name]), 0)

    def own_config(self, reference: ModelReference) -> dict[str, Any]:
        """Return the model's own config.json, without a quantization. Raises SourceError when it cannot be read."""
        return self._read_config(reference, self.folder(reference))

    def config_digest(self, reference: ModelReference) -> str:
        """Return a digest of the config's part that may change what the weights compute."""
        text = json.dumps(computing(self.own_config(reference)), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _read_config(self, reference: ModelReference, folder: Path) -> dict[str, Any]:
        config = read_object(folder / "config.json", f"{reference} must be a folder that transformers has saved")
        plain = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
        return unrolled_config(plain) if is_rolled(plain) else plain

    def engine_folder(self, reference: ModelReference) -> Path:
        """Return a folder that engines can start from: the model's own, or one without its quantization.

        An engine replaces all weights before it answers, so the latter has zeros.
        """
        folder = self.folder(reference)
        source = self._checkpoint(folder)
        plain = isinstance(source, Checkpoint) and not source.is_pickled and not self._own_rows(reference)
        return folder if plain else self._placeholder(reference)

    def _placeholder(self, reference: ModelReference) -> Path:
        source = self[reference]
        return placeholder(self.config(reference), source.shapes, {name: source.dtype(name) for name in source.shapes})

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
        """Return the licence that the model's card declares; of an adapter with a licence of its own, both: see
        `licences.both`.
        """
        folder, adapter = self._places(reference)
        own = licence(adapter) if adapter else None
        return both(own, licence(folder)) if own else licence(folder)

    def card(self, reference: ModelReference) -> str:
        """Return an excerpt of the adapter's card, or else of the model's; empty without one."""
        return next(filter(None, map(excerpt, self._with_cards(reference))), "")

    def _with_cards(self, reference: ModelReference) -> list[Path]:
        folder, adapter = self._places(reference)
        return [adapter, folder] if adapter else [folder]

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
        folder, adapter = self._places(reference)
        expert = mixture_of(folder)
        if expert:
            folder = expert[0].resolve()
        files = _weights_in(folder)
        if quantization_of(folder):  # it says how the weights are read
            files += [*folder.glob("config.json"), *folder.glob("hf_quant_config.json")]
        if expert:
            files.append(self._places(reference)[0] / MARK)
        if adapter:
            files += [*_weights_in(adapter, "adapter_model*.safetensors"), *adapter.glob(ADAPTER)]
        return files


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter, and no weights of a model; some hold the model's config as well."""
    if not (folder / ADAPTER).exists():
        return False
    own = [file for file in weight_files(folder) if not file.name.startswith("adapter")]
    return not (folder / "config.json").exists() or not (own or any(folder.glob("pytorch_model*.bin")))


def _leave_out_tied_head(source: Checkpoint, config: Mapping[str, Any]) -> None:
    """Leave out a head that a file holds though the config ties it to the embeddings, where the numbers are the same.

    Merged by itself it may become another weight than the embeddings, as random masks go by the tensor's name.
    """
    if not (config.get("tie_word_embeddings") or text_config(config).get("tie_word_embeddings")):
        return
    tables = [name for name in source.shapes if EMBEDDINGS.search(name)]
    for head in [name for name in source.shapes if HEADS.search(name)]:
        if any(torch.equal(source.tensor(head), source.tensor(name)) for name in tables):
            source.shapes = {name: shape for name, shape in source.shapes.items() if name != head}
            source.derived = {**source.derived, head: "another name of a weight"}


class View(Sources):
    """Other models as they are in `whole`, but for what a subclass changes of their weights and configs."""

    def __init__(self, whole: Sources) -> None:
        super().__init__(whole.root, whole.base)
        self.whole = whole

    def folder(self, reference: ModelReference) -> Path:
        return self.whole.folder(reference)

    def without_adapter(self, reference: ModelReference) -> ModelReference:
        return self.whole.without_adapter(reference)

    def own(self, reference: ModelReference) -> Source:
        return self.whole.own(reference)

    def model(self, reference: ModelReference) -> Source:
        return self.whole.model(reference)

    def layout(self, reference: ModelReference) -> Path:
        return self.whole.layout(reference)

    def left_out(self, reference: ModelReference) -> Mapping[str, str]:
        return self.whole.left_out(reference)

    def lent(self, reference: ModelReference) -> Mapping[str, str]:
        return self.whole.lent(reference)

    def engine_folder(self, reference: ModelReference) -> Path:
        return self._placeholder(reference)


def _weights_in(folder: Path, pattern: str = "model*.safetensors") -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or weight_files(folder, pattern)
