"""A merged model written as a normal Hugging Face folder: whole, or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from llmevo.errors import RecipeError, SourceError, UserError
from llmevo.merging.merger import Merger, Seed, branches_of, merge
from llmevo.merging.mixture.classes import mixture_config
from llmevo.merging.mixture.mixture import ROUTER
from llmevo.merging.plan import plan
from llmevo.merging.recipe import Recipe
from llmevo.merging.tokenizer import Trimmed, chat_template, token_count, write_tokenizer
from llmevo.merging.vocabulary import ByToken, by_token, plain, tokenizer_folder
from llmevo.merging.widening import widened
from llmevo.models.architecture import TOKEN_IDS, text_config
from llmevo.models.checkpoints import read_object, widest
from llmevo.models.files import cache_folder, partial_folder, read_sha256, rename_once, sync
from llmevo.models.layer_kinds import rearranged, scale_rope
from llmevo.models.references import ModelReference
from llmevo.models.safetensors_writer import header_size, write_weights
from llmevo.models.sources import Sources
from llmevo.models.tokenizer import set_chat_template, tokenizer_files

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
OF_A_PLACE = ("auto_map", "_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")
"""Keys of configs that name files beside them, or the place of a model."""


class MergedModel:
    """A recipe's result before it is written: shapes, weights one at a time, config, and the files beside them.

    With a `tokenizer_source` the embeddings are merged by token where the models' tokens differ, and cut off beyond the
    last token, as in mergekit; where they do not differ, all rows stay without `trim`. Raises RecipeError when the
    recipe has no result or a config cannot describe it, SourceError when it has a `tokenizer_source` and the models'
    tokens cannot be united.
    """

    def __init__(self, recipe: Recipe, sources: Sources, seed: Seed = 0, trim: bool = True) -> None:
        self._whole = plain(sources)
        if aligned := by_token(recipe, sources):
            if recipe.mixture:
                raise RecipeError(
                    "mixture: the models' tokens differ, and experts share one vocabulary; use one tokenizer"
                )
            sources = aligned
        elif recipe.vocabulary_source is not None and trim and (rows := token_count(recipe.tokenizer_donor, sources)):
            sources = Trimmed(sources, recipe.donor, rows)
        self.recipe, self._seed = recipe, seed
        recipe, sources = widened(recipe, sources)
        self.sources, self._merged = sources, recipe
        donor = sources[recipe.donor].shapes
        steps = plan(recipe, [*donor], sources.depth(recipe.donor))
        for step in steps:  # raise for a missing parameter before anything is merged
            recipe.values(step.of, step.name, step.depth, step.inputs)
        self.shapes = {step.name: donor[step.inputs[0]] for step in steps}
        """Every tensor's shape, in the order of the weights."""
        self.origins = {step.name: step.inputs[0] for step in steps}
        """Every tensor's name in the first source of its slice; empty for a mixture."""
        if recipe.mixture:
            self.shapes, self.origins = Merger(sources).shapes(recipe), {}
        self.chat_template = chat_template(self.recipe, sources)
        """The template that the recipe asks for; empty where the tokenizer keeps its own."""
        self._aligned = aligned
        branches_of(recipe, sources)  # raises for gains that cannot be folded
        self.config()  # raises for layers that it cannot describe

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, merged weight). Raises CandidateError when one is not finite."""
        return merge(self._merged, self.sources, self._seed)

    @property
    def _speaker(self) -> ModelReference:
        """The model whose special tokens and generation config the result has: the one whose tokenizer it gets."""
        return self.recipe.tokenizer_donor

    def config(self) -> dict[str, Any]:
        """Return the donor's config with the result's layers.

        The numbers of special tokens are those of the model whose tokenizer the result gets.
        """
        recipe, config = self.recipe, self.sources.config(self.recipe.donor)
        if self._speaker != recipe.donor:
            numbers = self.sources.own_config(self._speaker)
            own = text_config(config)
            config = {key: value for key, value in config.items() if key not in TOKEN_IDS}
            config |= {key: numbers[key] for key in TOKEN_IDS if key in numbers}
            for name, nested in [*config.items()]:
                if nested is own:  # a model of images and text has them there as well
                    theirs = {key: of for key in TOKEN_IDS if (of := text_config(numbers).get(key)) is not None}
                    config[name] = {key: theirs.get(key, of) for key, of in own.items()}
        if recipe.rope:
            config = deepcopy(config)
            scale_rope_of(recipe, config)
        return with_layers_of(recipe, self.sources, config)

    def write(
        self,
        folder: Path,
        weights: Iterator[tuple[str, Tensor]],
        shapes: Mapping[str, tuple[int, ...]],
        changes: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the model with these weights, its own or those in another format, and `changes` of the config."""
        self.write_files(folder)  # first, as a file may be damaged and merging take hours
        (folder / "config.json").unlink()  # comes last: without it the folder is no model
        dtypes = write_weights(weights, folder, header_size(shapes.items()))
        self.write_config(folder, dtypes - {"float8_e4m3fn"}, changes)  # in which nothing is computed

    def write_config(self, folder: Path, dtypes: set[str], changes: Mapping[str, Any] | None = None) -> None:
        """Write the config. `dtypes` are the types of the weights, `changes` further keys."""
        config = {**self.config(), **(changes or {})}
        if dtype := self._loaded_as(dtypes):
            nested = [of for of in config.values() if isinstance(of, dict) and {"dtype", "torch_dtype"} & of.keys()]
            for holder in (config, *nested):
                holder["dtype"] = dtype
                holder.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps(_without_places(config), indent=2) + "\n")

    def write_files(self, folder: Path) -> None:
        """Write config, generation config, tokenizer, a processor's files and the recipe: all but the weights.

        Raises SourceError for a tokenizer's file that is damaged, and when the models are by token and the donor's
        tokenizer cannot be given their tokens.
        """
        self.write_config(folder, set())
        layout, donor = self.sources.layout(self.recipe.donor), self.recipe.tokenizer_donor
        tokenizer = tokenizer_folder(donor, self._whole)
        speaker = layout if self._speaker == self.recipe.donor else self.sources.folder(self._speaker)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (tokenizer / name).exists():
                read_object(tokenizer / name)  # an error names the model's own file
        files = [speaker / "generation_config.json", *(layout / name for name in PROCESSOR_FILES)]
        for file in [*filter(Path.exists, files), *tokenizer_files(tokenizer)]:
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, folder / file.name)
        if self._aligned:
            write_tokenizer(self._aligned.vocabulary, folder)
        file = folder / "tokenizer_config.json"
        if file.exists() and (known := _without_places(content := read_object(file))) != content:
            file.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n")
        if self.chat_template:
            set_chat_template(folder, self.chat_template)
        if self.recipe.mixture and self.recipe.mixture.router:
            (folder / ROUTER).write_text((self.sources.root / self.recipe.mixture.router).read_text())
        written = self.recipe.with_router(ROUTER).seen_from(folder, self.sources.root)
        (folder / "mergekit_config.yml").write_text(written.to_yaml())

    def _loaded_as(self, dtypes: set[str]) -> str:
        """Return the type in which a model with weights of these types is loaded: the widest of them.

        Empty where the donor's config says it: it has the same several types, or there is no floating-point weight.
        """
        donor = self.sources[self.recipe.donor]
        floating = {of for name in dtypes if (of := getattr(torch, name)).is_floating_point}
        if not floating or (len(floating) > 1 and floating <= {donor.dtype(name) for name in donor.shapes}):
            return ""
        return str(widest(floating)).removeprefix("torch.")


def with_layers_of(recipe: Recipe, sources: Sources, config: dict[str, Any]) -> dict[str, Any]:
    """Return the donor's config with the layers of a recipe's result; see `models.layer_kinds.rearranged`.

    Raises RecipeError where a config cannot describe them.
    """
    depth = sources.depth(recipe.donor)
    try:
        config = rearranged(config, depth, recipe.origins(depth))
        return mixture_config(config, recipe.mixture) if recipe.mixture else config
    except SourceError as error:
        raise RecipeError(f"{recipe.donor}: {error}") from error


def scale_rope_of(recipe: Recipe, config: dict[str, Any]) -> None:
    """Change a config by a recipe's `rope`. Raises RecipeError for a model without a rotary embedding."""
    try:
        scale_rope(cast(dict[str, Any], text_config(config)), recipe.rope or 1.0)
    except SourceError as error:
        raise RecipeError(f"{recipe.donor}: {error}") from error


def write_model(
    recipe: Recipe,
    sources: Sources,
    out: Path,
    seed: Seed = 0,
    extra: Mapping[str, str] | None = None,
    trim: bool = True,
) -> None:
    """Merge into `out`: weights, config, generation config, tokenizer, the recipe, and `extra` text files.

    Weights are written one at a time, in a hidden folder that is renamed at the end, so a full disk or a stop leaves no
    incomplete model. Raises what `MergedModel` raises, and UserError when `out` is not empty or cannot be written,
    CandidateError when a merged weight is not finite.
    """
    model = MergedModel(recipe, sources, seed, trim)
    with whole_folder(out) as folder:
        model.write(folder, model.weights(), model.shapes)
        write_texts(folder, extra)


def custom_code(config: Mapping[str, Any]) -> list[str]:
    """Return the Python files without which no library loads a model with this config; they are not copied."""
    from transformers import CONFIG_MAPPING  # takes a second

    named: Any = config.get("auto_map")
    if not isinstance(named, dict) or config.get("model_type") in CONFIG_MAPPING:
        return []
    classes = [name for of in named.values() for name in (of if isinstance(of, list) else [of]) if name]
    return [*dict.fromkeys(f"{str(name).rpartition('--')[2].rpartition('.')[0]}.py" for name in classes)]


def _without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without the names of Python files, which a merge does not have, and the place of a model."""
    kept = {key: value for key, value in config.items() if key not in OF_A_PLACE}
    return {key: _without_places(value) if isinstance(value, dict) else value for key, value in kept.items()}


def write_texts(folder: Path, texts: Mapping[str, str] | None) -> None:
    """Write text files into a folder, over those of the same names."""
    for name, text in (texts or {}).items():
        (folder / name).write_text(text)


def check_new(out: Path) -> None:
    """Raise UserError unless the folder is new or empty, and can be renamed to."""
    try:
        if os.path.ismount(out):
            raise UserError(f"{out} is where a disk is mounted, which nothing can be renamed to; give a folder in it")
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error})") from error
    if taken:
        raise UserError(f"{out} exists already; choose another folder, or remove it")


def merged_tokenizer(recipe: Recipe, sources: Sources) -> Path:
    """Return the folder with the tokenizer of a merge: the model's whose it is, or one in the cache folder, with the
    merge's config, where no model has its tokens.
    """
    if not isinstance(sources, ByToken):
        return tokenizer_folder(recipe.tokenizer_donor, sources)
    folders = cache_folder() / "vocabularies"
    folders.mkdir(parents=True, exist_ok=True)
    with partial_folder(folders / "new") as written:
        MergedModel(recipe, sources).write_files(written)
        contents = [f"{file.name} {read_sha256(file)}" for file in sorted(written.iterdir())]
        out = folders / hashlib.sha256("\n".join(contents).encode()).hexdigest()[:24]
        rename_once(written, out)
    return out


@contextmanager
def whole_folder(out: Path) -> Generator[Path]:
    """Yield a folder that is renamed to `out` at the end, or removed after an error.

    Raises UserError when `out` is not empty or cannot be written.
    """
    check_new(out)
    try:
        place = out.resolve()  # beside a link, and from inside `.`, nothing can be renamed
        place.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(place) as partial:
            yield partial
            partial.chmod(0o755)
            for part in (*partial.rglob("*"), partial):  # before the name, so that a power cut loses both or none
                sync(part)
            partial.replace(place)
            sync(place.parent)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error})") from error
