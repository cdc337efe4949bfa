"""A merged model written as a normal Hugging Face folder: whole, or not at all."""

import json
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from llmevo.errors import UserError
from llmevo.merging.merger import Seed, merge
from llmevo.merging.recipe import Recipe, plan
from llmevo.merging.tokenizer import Trimmed, chat_template, shared_vocabulary
from llmevo.models.architecture import DEPTH_KEYS, depth_of
from llmevo.models.files import partial_folder, sync
from llmevo.models.safetensors_writer import header_size, write_weights
from llmevo.models.sources import Sources
from llmevo.models.tokenizer import set_chat_template

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")
CHAT_FILES = ("chat_template*",)
LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Keys of a config with an entry for each layer, in models whose layers differ."""


class MergedModel:
    """A recipe's result before it is written: shapes, weights one at a time, config, and the files beside them.

    With a `tokenizer_source` embeddings beyond the last token are cut off, as in mergekit; without `trim` they stay.
    Raises RecipeError when the recipe has no result, SourceError when it has a `tokenizer_source` and the models'
    vocabularies differ.
    """

    def __init__(self, recipe: Recipe, sources: Sources, seed: Seed = 0, trim: bool = True) -> None:
        if recipe.tokenizer_source is not None and (rows := shared_vocabulary(recipe, sources)) and trim:
            sources = Trimmed(sources, recipe.donor, rows)
        self.recipe, self.sources, self._seed = recipe, sources, seed
        donor = sources[recipe.donor].shapes
        steps = plan(recipe, [*donor], sources.depth(recipe.donor))
        for step in steps:  # raise for a missing parameter before anything is merged
            recipe.values(step.of, step.name, step.depth, step.inputs)
        self.shapes = {step.name: donor[step.inputs[0]] for step in steps}
        """Every tensor's shape, in the order of the weights."""
        self._template = chat_template(recipe, sources)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, merged weight). Raises CandidateError when one is not finite."""
        return merge(self.recipe, self.sources, self._seed)

    def config(self) -> dict[str, Any]:
        """Return the donor's config with the result's layers."""
        config = self.sources.config(self.recipe.donor)
        layers = depth_of(config)
        # The donor's layers that the result's layers correspond to: those of each slice's first source.
        starts = [(of.sources[0].layer_range[0], of.depth) for of in self.recipe.output_slices(layers)]
        origins = [start + offset for start, depth in starts for offset in range(depth)]
        for key in LAYER_LISTS:
            if isinstance(config.get(key), list) and len(config[key]) == layers:
                config[key] = [config[key][origin] for origin in origins]
        for key in DEPTH_KEYS:
            if key in config:
                config[key] = len(origins)
        return config

    def write_files(self, folder: Path, dtypes: set[str], changes: Mapping[str, Any] | None = None) -> None:
        """Write config, generation config, tokenizer and the recipe; `dtypes` are the types of the weights, `changes`
        further keys of the config.
        """
        config = {**self.config(), **(changes or {})}
        if len(dtypes) == 1:
            config["dtype"] = next(iter(dtypes))
            config.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        donor, tokenizer = (self.sources.folder(of) for of in (self.recipe.donor, self.recipe.tokenizer_donor))
        files = [*donor.glob("generation_config.json")]
        files += [file for pattern in (*TOKENIZER_FILES, *CHAT_FILES) for file in tokenizer.glob(pattern)]
        for file in files:
            shutil.copyfile(file, folder / file.name)
        if self._template:
            set_chat_template(folder, self._template)
        (folder / "mergekit_config.yml").write_text(self.recipe.to_yaml())


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
        dtypes = write_weights(model.weights(), folder, header_size(model.shapes.items()))
        model.write_files(folder, dtypes)
        write_texts(folder, extra)


def write_texts(folder: Path, texts: Mapping[str, str] | None) -> None:
    """Write text files into a folder, over those of the same names."""
    for name, text in (texts or {}).items():
        (folder / name).write_text(text)


def check_new(out: Path) -> None:
    """Raise UserError unless the folder is new or empty."""
    try:
        taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error})") from error
    if taken:
        raise UserError(f"{out} exists already; choose another folder, or remove it")


@contextmanager
def whole_folder(out: Path) -> Generator[Path]:
    """Yield a folder that is renamed to `out` at the end, or removed after an error.

    Raises UserError when `out` is not empty or cannot be written.
    """
    check_new(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(out) as partial:
            yield partial
            partial.chmod(0o755)
            for place in (*partial.rglob("*"), partial):  # before the name, so that a power cut loses both or none
                sync(place)
            partial.replace(out)
            sync(out.parent)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error})") from error
