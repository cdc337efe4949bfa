"""The prepared experts of a recipe as models of their own, with the recipe that merges them: for mergekit and others
that know no preparation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmevo.errors import UserError
from llmevo.export.lora import sum_of_adapters, write_adapter
from llmevo.export.low_rank import Rank
from llmevo.export.modules import Modules
from llmevo.merging.merger import Seed
from llmevo.merging.plan import plan
from llmevo.merging.recipe import BY_SLICE, PREPARE, Recipe
from llmevo.merging.vocabulary import plain
from llmevo.merging.writer import whole_folder, write_model, write_texts
from llmevo.models.references import ModelPath, ModelReference, folder_of
from llmevo.models.sources import Sources

RECIPE = "recipe.yml"


def write_experts(recipe: Recipe, sources: Sources, out: Path, seed: Seed, texts: Mapping[str, str]) -> int:
    """Write every prepared expert into a folder of its own in `out`, with `recipe.yml`, and return their number.

    Where an expert is an adapter of the base, so is the prepared one, exactly; another one is written in float32.
    Raises UserError for a recipe without a preparation, and for one whose experts take part with other layers.
    """
    if recipe.prepare is None or recipe.base_model is None:
        raise UserError("--as experts: the recipe prepares no models, so they are files already; leave --as out")
    steps = plan(recipe, [*sources[recipe.donor].shapes], sources.depth(recipe.donor))
    if any(name != step.name for step in steps for name in (*step.inputs, step.base)):
        raise UserError("--as experts: the recipe moves layers, and a prepared expert is a whole model; leave --as out")
    experts = [reference for reference in recipe.references if reference != recipe.base_model]
    base = sources.without_adapter(recipe.donor)
    folder_of_base, stored = sources.folder(base).absolute(), plain(sources)[base]
    names: dict[str, str] = {str(recipe.base_model): _placed(recipe.base_model, sources)}
    with whole_folder(out) as folder:
        for place, expert in enumerate(experts):
            name = f"{place}-{expert.name}"
            alone = _alone(recipe, expert)
            if changes := sum_of_adapters(alone, sources, base):
                modules = Modules(folder_of_base, stored.shapes)
                write_adapter(
                    changes, stored, modules, ModelPath(path=str(folder_of_base)), folder / name, Rank(), is_sum=True
                )
                names[str(expert)] = f"{folder_of_base}+{(out / name).absolute()}"
            else:
                whole = alone.model_copy(update={"dtype": "float32", "out_dtype": None})
                write_model(whole, sources, folder / name, seed, trim=False)
                names[str(expert)] = str((out / name).absolute())
        write_texts(folder, {**texts, RECIPE: Recipe.model_validate(_plain(recipe, names)).to_yaml()})
    return len(experts)


def _placed(reference: ModelReference, sources: Sources) -> str:
    """Return the absolute place of a model, with that of the adapter on it."""
    folder, own = sources.folder(reference), folder_of(reference.lora or reference.model, sources.root)
    is_adapted = reference.lora is not None or (reference.model.expert is None and own != folder)
    return f"{folder.absolute()}+{own.absolute()}" if is_adapted else str(folder.absolute())


def _alone(recipe: Recipe, expert: ModelReference) -> Recipe:
    """Return the recipe of one prepared expert."""

    def alone(of: dict[str, Any]) -> dict[str, Any]:
        return {**of, "parameters": {"weight": float(of["model"] == str(expert))}}

    def prepared(of: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in (of.get("parameters") or {}).items() if key == PREPARE}

    given = recipe.as_dict()
    kept = {key: given[key] for key in ("base_model", "prepare", "tokenizer_source", "dtype") if key in given}
    kept["merge_method"] = "task_arithmetic"
    if recipe.slices:
        kept["merge_method"] = BY_SLICE
        kept["slices"] = [
            {
                "sources": [alone(source) for source in of["sources"]],
                "base_model": of.get("base_model"),
                "merge_method": "task_arithmetic" if recipe.origin_of(own) else "linear",  # it needs no base
                "parameters": prepared(of),
            }
            for own, of in zip(recipe.slices, given["slices"], strict=True)
        ]
    else:
        kept["models"] = [alone(model) for model in given["models"]]
    return Recipe.model_validate({**kept, "parameters": prepared(given)})


def _plain(value: Any, names: Mapping[str, str]) -> Any:
    """Return a recipe's values without its preparation, with other names of the models."""
    if isinstance(value, Recipe):
        value = value.as_dict()
    if isinstance(value, list):
        return [_plain(each, names) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each, names) for key, each in value.items() if key != PREPARE}
    return names.get(value, value) if isinstance(value, str) else value
