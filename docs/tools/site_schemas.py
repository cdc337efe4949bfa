"""The JSON schemas of configs, recipes and logs, from the models that read them, with the documentation of each key.

    python docs/tools/site_schemas.py            # write docs/schemas/*.json anew

pydantic's own schemas lack what validators accept besides the fields' types, such as a budget as one number or a task
as its name; `_SHORT` and `_also` add it.
"""

import ast
import inspect
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from textwrap import dedent
from typing import Any, get_args

from pydantic import BaseModel

from llmevo.config import TRACKERS, Config
from llmevo.llm import CLIENTS
from llmevo.merging.methods.registry import METHODS
from llmevo.merging.preparation.registry import STEPS
from llmevo.merging.recipe import BY_SLICE, DTYPES, WITHOUT_EFFECT, Recipe
from llmevo.run.log.events import EVENTS, Event
from llmevo.search.paths.registry import every

FOLDER = Path(__file__).parents[1] / "schemas"

Schema = dict[str, Any]

OF_LOGS = ("sigma_rule",)
"""Keys of `search` that only logs have."""

TEXT: Schema = {"type": "string"}
STEP: Schema = {
    "anyOf": [
        {"enum": [*STEPS]},
        {"type": "object", "propertyNames": {"enum": [*STEPS]}, "minProperties": 1, "maxProperties": 1},
    ]
}
_SHORT: dict[str, list[Schema]] = {
    "ModelReference": [TEXT],
    "ModelPath": [TEXT],
    "Task": [TEXT],
    "Preparation": [{"type": "array", "items": STEP}],
    "Budget": [{"type": "integer", "minimum": 1}, TEXT],
}
"""{model: the other forms in which a value of it may be written}."""


@cache
def field_docs(model: type) -> dict[str, str]:
    """{field: the text below it} of a class and those it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if base.__module__.partition(".")[0] != "llmevo":
            continue
        body = ast.parse(dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                found.pop(field.target.id, None)
                if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def models_in(kind: Any) -> Iterator[type[BaseModel]]:
    """The models in an annotation, through lists, unions and mappings."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in get_args(kind):
        yield from models_in(part)


def all_models(*roots: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """{name: model} of these and of all that their fields hold."""
    found: dict[str, type[BaseModel]] = {}
    left = [*roots]
    while left:
        model = left.pop()
        if found.setdefault(model.__name__, model) is model:
            inner = [one for field in model.model_fields.values() for one in models_in(field.annotation)]
            left += [one for one in inner if one.__name__ not in found]
    return found


def _documented(schema: Schema, roots: list[type[BaseModel]]) -> Schema:
    """The schema with the documentation of every key and the short forms of values."""
    for name, model in all_models(*roots).items():
        own = schema if schema.get("title") == name else schema["$defs"].get(name)
        if own is None:
            continue
        names = {field: (of.validation_alias or of.alias or field) for field, of in model.model_fields.items()}
        for field, text in field_docs(model).items():
            if (key := names.get(field)) in own.get("properties", {}):
                own["properties"][key]["description"] = text
        if "description" in own:
            own["description"] = " ".join(own["description"].partition(">>>")[0].split())
    if steps := schema["$defs"].get("Preparation", {}).get("properties", {}).get("steps"):
        steps["items"] = STEP
    for name, forms in _SHORT.items():
        if whole := schema["$defs"].get(name):
            description = whole.pop("description", "")
            schema["$defs"][name] = {"description": description, "anyOf": [*forms, whole]}
    return schema


def _also(schema: Schema, key: str, *forms: Schema) -> None:
    """Accept further forms of a value."""
    own = schema["properties"][key]
    documentation = {word: own.pop(word) for word in ("description", "default", "title") if word in own}
    schema["properties"][key] = {**documentation, "anyOf": [*forms, *own.get("anyOf", [own])]}


def _one_of(schema: Schema, key: str, values: Any) -> None:
    """Accept these values only."""
    own = schema["properties"][key]
    own.pop("type", None)
    own["enum"] = [*values]


def config_schema() -> Schema:
    """The schema of `config.yml`."""
    schema = _documented(Config.model_json_schema(), [Config])
    parts: Schema = schema["$defs"]
    switch: Schema = {"type": "boolean"}
    _also(schema, "gate", switch)
    _also(schema, "constraints", TEXT)
    named = {"type": "object", "required": ["name"], "properties": {"name": {"enum": [*TRACKERS]}}}
    tracker: Schema = {"anyOf": [{"enum": [*TRACKERS]}, named]}
    schema["properties"]["loggers"]["items"] = tracker
    _also(schema, "loggers", tracker)
    _also(parts["Search"], "racing", switch)
    _one_of(parts["Search"], "optimizer", every())
    for key in OF_LOGS:
        del parts["Search"]["properties"][key]
    _one_of(parts["Llm"], "proposer", ["auto", *CLIENTS, "simulated"])
    methods: Schema = {"enum": [*METHODS]}
    genome = parts["Genome"]["properties"]
    genome["merge_method"] = {
        "description": genome["merge_method"]["description"],
        "anyOf": [methods, {"type": "array", "items": methods, "minItems": 1}],
    }
    _one_of(parts["Genome"], "dtype", DTYPES)
    task: Schema = parts["Task"]["anyOf"][-1]
    del task["required"]
    task["anyOf"] = [{"required": ["name"]}, {"required": ["text"]}]
    return _titled(schema, "A config of llmevo")


def recipe_schema() -> Schema:
    """The schema of a merge recipe, such as `best.yml`; mergekit's form with llmevo's keys."""
    schema = _documented(Recipe.model_json_schema(), [Recipe])
    parts: Schema = schema["$defs"]
    names = [*METHODS, BY_SLICE]
    schema["properties"]["merge_method"] = {"description": "The merge method.", "enum": names}
    parts["OutputSlice"]["properties"]["merge_method"].update(anyOf=[{"enum": [*METHODS]}, {"type": "null"}])
    schema["properties"] |= {key: {"description": "Read, and without effect."} for key in WITHOUT_EFFECT}
    schema["properties"]["modules"] = {
        "description": "mergekit's long form: the keys of a recipe by the part of a model. One part can be merged.",
        "type": "object",
    }
    schema["required"] = []
    schema["anyOf"] = [{"required": ["merge_method"]}, {"required": ["modules"]}]
    return _titled(schema, "A merge recipe of llmevo, in mergekit's form")


def event_models() -> list[type[BaseModel]]:
    """The events, in the order of the union."""
    return [*get_args(get_args(Event)[0])]


def events_schema() -> Schema:
    """The schema of a line of `events.jsonl`."""
    schema = _documented(EVENTS.json_schema(), event_models())
    return _titled(schema, "An event of a run: a line of events.jsonl")


def _titled(schema: Schema, title: str) -> Schema:
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": title}


SCHEMAS = {"config.json": config_schema, "recipe.json": recipe_schema, "events.json": events_schema}


def text_of(name: str) -> str:
    """The content of a schema's file."""
    return json.dumps(SCHEMAS[name](), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for file in SCHEMAS:
        (FOLDER / file).write_text(text_of(file))
