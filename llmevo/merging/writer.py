"""A merged model written as a normal Hugging Face folder: whole, or not at all."""

import json
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from llmevo.errors import UserError
from llmevo.merging.merger import Seed, merge
from llmevo.merging.recipe import Recipe, plan
from llmevo.merging.tokenizer import Trimmed, chat_template, shared_vocabulary
from llmevo.models.architecture import DEPTH_KEYS, LAYER_LISTS, text_config
from llmevo.models.files import partial_folder, sync
from llmevo.models.safetensors_writer import header_size, write_weights
from llmevo.models.sources import Sources
from llmevo.models.tokenizer import set_chat_template

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")
CHAT_FILES = ("chat_template*",)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


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
    incomplete model. With a `tokenizer_source` embeddings beyond the last token are cut off, as in mergekit; without
    `trim` they stay. Raises UserError when `out` is not empty or cannot be written, RecipeError when the recipe has no
    result, SourceError when it has a `tokenizer_source` and the models' vocabularies differ, CandidateError when a
    merged weight is not finite.
    """
    if recipe.tokenizer_source is not None and (rows := shared_vocabulary(recipe, sources)) and trim:
        sources = Trimmed(sources, recipe.donor, rows)
    donor = sources[recipe.donor].shapes
    steps = plan(recipe, [*donor], sources.depth(recipe.donor))
    for step in steps:  # raise for a missing parameter before anything is merged
        recipe.values(step.of, step.name, step.depth, step.inputs)
    template = chat_template(recipe, sources)
    with whole_folder(out) as folder:
        shapes = [(step.name, donor[step.inputs[0]]) for step in steps]
        dtypes = write_weights(merge(recipe, sources, seed), folder, header_size(shapes))
        _write_config(recipe, sources, folder, dtypes)
        for name in ("generation_config.json", *PROCESSOR_FILES):
            if (file := sources.layout(recipe.donor) / name).exists():
                shutil.copyfile(file, folder / name)
        tokenizer = sources.folder(recipe.tokenizer_donor)
        for pattern in (*TOKENIZER_FILES, *CHAT_FILES):
            for file in tokenizer.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        if template:
            set_chat_template(folder, template)
        for name, text in {"mergekit_config.yml": recipe.to_yaml(), **(extra or {})}.items():
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


def _write_config(recipe: Recipe, sources: Sources, folder: Path, dtypes: set[str]) -> None:
    """Write the donor's config with the result's type and layers."""
    config = sources.config(recipe.donor)
    if len(dtypes) == 1:
        nested = [of for of in config.values() if isinstance(of, dict) and {"dtype", "torch_dtype"} & of.keys()]
        for holder in (config, *nested):
            holder["dtype"] = next(iter(dtypes))
            holder.pop("torch_dtype", None)
    layers, text = sources.depth(recipe.donor), text_config(config)
    # The donor's layers that the result's layers correspond to: those of each slice's first source.
    starts = [(of.sources[0].layer_range[0], of.depth) for of in recipe.output_slices(layers)]
    origins = [start + offset for start, depth in starts for offset in range(depth)]
    # A multimodal model's config is nested, and older ones have the language model's keys at the top as well.
    for holder in (config,) if text is config else (config, cast(dict[str, Any], text)):
        for key in LAYER_LISTS:
            if isinstance(holder.get(key), list) and len(holder[key]) == layers:
                holder[key] = [holder[key][origin] for origin in origins]
        for key in DEPTH_KEYS:
            if key in holder:
                holder[key] = len(origins)
    if len(origins) != layers and not any(
        key in holder for key in (*DEPTH_KEYS, *LAYER_LISTS) for holder in (text, config)
    ):
        cast(dict[str, Any], text)[DEPTH_KEYS[0]] = len(origins)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
