"""The reference pages, from the code: config keys, recipes, commands, events, optimizers, methods, the Python API.

    python docs/tools/site_reference.py            # write docs/methods/*.md anew, but for the index

`pages()` has them all as Markdown by their place in `docs`; `site_hooks.py` puts them into the site when it is built,
so they are never out of date. Those of the methods are files too, which can be read without the site.
"""

import ast
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from statistics import median
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.models import ArgumentInfo

sys.path.insert(0, str(Path(__file__).parent))

from site_notebooks import NOTEBOOKS, notebook_page
from site_schemas import OF_LOGS, event_models, field_docs, models_in

import llmevo
from llmevo import testing
from llmevo.cli.app import COMMANDS
from llmevo.cli.terminal import EXIT_STATUSES
from llmevo.config import FOREIGN_OPTIONS, REMOVED, REMOVED_VALUES, TRACKERS, Config
from llmevo.llm.client import Price
from llmevo.merging.methods.registry import METHODS, WIDEN, Method, Parameter
from llmevo.merging.recipe import Conditional, Recipe, Setting
from llmevo.models.references import ModelReference
from llmevo.search.genome import declared_by, walks
from llmevo.search.optimizers import ASKING
from llmevo.search.paths.registry import every

DOCS = Path(__file__).parents[1]
RESULTS = DOCS.parent / "benchmarks" / "results"
PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path", NoneType: "null"}


def pages() -> dict[str, str]:
    """{path in `docs`: Markdown} of all generated pages."""
    return {
        "reference/config.md": config_page(),
        "reference/recipe.md": recipe_page(),
        "reference/commands.md": commands_page(),
        "reference/events.md": events_page(),
        "reference/optimizers.md": optimizers_page(),
        "reference/python.md": python_page(),
        **{f"notebooks/{file.stem}.md": notebook_page(file) for file in sorted(NOTEBOOKS.glob("*.ipynb"))},
        **method_pages(),
    }


def method_pages() -> dict[str, str]:
    """{path in `docs`: Markdown} of the pages that are also written there."""
    return {f"methods/{name}.md": method_page(method) for name, method in METHODS.items()}


def form(kind: Any) -> str:
    """The values of an annotation, in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind == Setting:
        return "[setting](#setting)"
    if origin is Annotated:
        return form(parts[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" if value else "empty" for value in parts)
    if origin in (Union, UnionType):
        return " or ".join(form(part) for part in parts if part is not NoneType)
    if origin is tuple:
        return f"[{', '.join(form(part) for part in parts)}]"
    if origin is list:
        inner = form(parts[0])
        return f"list of {'sections' if inner == 'section' else inner}"
    if origin is dict:
        return f"mapping of {form(parts[0])} to {form(parts[1])}"
    if kind is ModelReference:
        return "model"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "section"
    return PLAIN.get(kind, "any value")


def bounds(field: FieldInfo) -> str:
    """The bounds of a number, such as `≥ 0, < 1`."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [(signs[key], getattr(one, key)) for one in field.metadata for key in signs if hasattr(one, key)]
    return ", ".join(f"{sign} {value:g}" for sign, value in found)


def default(field: FieldInfo) -> str:
    """The default of a field, in words."""
    if field.is_required():
        return "required"
    value: Any = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined or value in ([], {}) or isinstance(value, BaseModel):
        shown = str(value) if isinstance(value, BaseModel) and type(value).__name__ == "Budget" else ""
        return f"default: {shown}" if shown else ""
    if isinstance(value, bool):
        value = str(value).lower()
    return f"default: `{list(value) if isinstance(value, tuple) else value}`"


REPEATED = (Price,)
"""Sections that are listed wherever they may stand; others where they come first."""


def sections(root: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The path of every section, and its model; each model once, where it comes first (see `REPEATED`)."""
    seen: set[type[BaseModel]] = {ModelReference, Conditional, root}
    left: list[tuple[str, type[BaseModel]]] = [("", root)]
    while left:
        path, model = left.pop(0)
        yield path, model
        inner: list[tuple[str, type[BaseModel]]] = []
        for key, field in model.model_fields.items():
            for one in dict.fromkeys(models_in(field.annotation)):
                if one not in seen or one in REPEATED:
                    seen.add(one)
                    inner.append((f"{path}.{key}" if path else key, one))
        left = inner + left


def linked(text: str) -> str:
    """The text with its addresses as links."""
    return re.sub(r"(?<!\]\()(?<!<)(https?://[^\s),]+)", r"<\1>", text)


def text_of(thing: Any) -> str:
    """The thing's own docstring, its example left out."""
    return linked(inspect.cleandoc(thing.__doc__ or "").partition("\n>>>")[0].strip())


def keys(model: type[BaseModel], path: str, places: Mapping[type[BaseModel], str]) -> Iterator[str]:
    """An entry for each key of a section. `places`: the path of every section."""
    docs = field_docs(model)
    for name, field in model.model_fields.items():
        if name in OF_LOGS:
            continue
        key = field.serialization_alias or field.alias or name
        place = f"{path}.{key}" if path else key
        facts = [form(field.annotation), bounds(field), default(field)]
        inner = [one for one in dict.fromkeys(models_in(field.annotation)) if one in places]
        yield f"### `{place}` {{ #{place}{'.' if inner else ''} }}"
        yield ""
        yield f"*{', '.join(fact for fact in facts if fact)}*"
        yield ""
        if said := docs.get(name) or " ".join(map(text_of, inner)):
            yield said
            yield ""
        if inner:
            yield f"Keys: {', '.join(f'[`{places[one]}`](#{places[one]})' for one in inner)}."
            yield ""


def of_model(root: type[BaseModel]) -> Iterator[str]:
    """A heading for each section, with its keys."""
    found = [*sections(root)]
    for path, model in found:
        places = {inner: own for own, inner in reversed(found) if own}
        places |= {inner: own for own, inner in found if own.rpartition(".")[0] == path and path}
        yield f"## `{path}` {{ #{path} }}" if path else "## The file"
        yield ""
        yield text_of(model)
        yield ""
        yield from keys(model, path, places)


def lines(*parts: Iterator[str] | Sequence[str] | str) -> str:
    """Parts as one Markdown text."""
    return "\n".join(line for part in parts for line in ([part, ""] if isinstance(part, str) else part)) + "\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells)] + [""]


def config_page() -> str:
    ways = [(name, way if isinstance(way, str) else f"in a config `{way[1]}`") for name, way in FOREIGN_OPTIONS.items()]
    removed = [(key, way) for key, way in REMOVED.items()]
    removed += [(f"{key}: {value}", way) for key, ways_ in REMOVED_VALUES.items() for value, way in ways_.items()]
    return lines(
        "# Config keys",
        "Every key of a `config.yml`, with its default. An unknown key is an error that names the nearest known one."
        " Relative paths start at the config's folder. Editors complete and check keys by the schema"
        " [config.json](../schemas/config.json): see [schemas](schemas.md).",
        "A command's options, such as `--budget 50` or, for any key, `--set search.budget=50`, take precedence over the"
        " file, and the file over the defaults.",
        of_model(Config),
        "## Trackers",
        "The options of an entry of `loggers`.",
        table(
            ["name", "options"], [(f"`{name}`", ", ".join(f"`{one}`" for one in own)) for name, own in TRACKERS.items()]
        ),
        "## Keys of other tools",
        "The keys of mergekit-evolve and LLM-Evo-Merge mean the same here. Their options have other names:",
        table(["there", "here"], [(f"`{name}`", way) for name, way in ways]),
        "## Removed",
        "Logs that have these can still be shown and exported.",
        table(["key", "instead"], [(f"`{key}`", way) for key, way in removed]),
    )


def recipe_page() -> str:
    return lines(
        "# Recipe keys",
        "A recipe is the input of `llmevo merge`, and a run's `best.yml`. It has mergekit's form; the schema is"
        " [recipe.json](../schemas/recipe.json). [Recipes](../concepts/recipe.md) explains it.",
        of_model(Recipe),
        "## Setting",
        "A value of `parameters` is a number, or true or false; a list of numbers, which is a gradient: from the first"
        " layer to the last the value goes from one to the next; or a mapping with these keys, or a list of such"
        " mappings, of which the first that fits a tensor holds.",
        keys(Conditional, "", {}),
        "The most specific place counts: a model's `parameters`, then the slice's, then the recipe's.",
    )


def parameters(command: Callable[..., Any]) -> dict[str, str]:
    """{argument or option with its value: its help} of a command."""
    found: dict[str, str] = {}
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        if hints[name] is typer.Context:
            continue
        kind, about = get_args(hints[name])[:2]
        if isinstance(about, ArgumentInfo):
            found[about.metavar or name.upper()] = about.help or ""
            continue
        flag = kind is bool
        value = "" if flag else f" {about.metavar or _placeholder(kind)}"
        given = [about.default] if isinstance(about.default, str) else []  # typer's first argument, here a name
        option = ", ".join([*given, *(about.param_decls or [])] or [f"--{name.replace('_', '-')}"])
        fixed = "" if flag or parameter.default in (None, "") else f" Default: `{parameter.default}`."
        found[option + value] = f"{about.help or ''}{fixed}"
    return found


def _placeholder(kind: Any) -> str:
    """The word for an option's value."""
    kinds = {*get_args(kind), kind}
    return "N" if int in kinds else "NUMBER" if float in kinds else "PATH" if "Path" in str(kind) else "TEXT"


def commands_page() -> str:
    parts: list[Any] = [
        "# Commands",
        "`llmevo COMMAND --help` prints the same. `llmevo --version` prints the version and the merge methods.",
    ]
    for command, example in COMMANDS.items():
        shown = [(f"`{name}`", about) for name, about in parameters(command).items()]
        parts += [f"## `llmevo {command.__name__}`", text_of(command), f"```sh\n{example}\n```", table(["", ""], shown)]
    parts += [
        "## Exit status",
        "Scripts may rely on these: they are the same for every command and every version. A run that was stopped, or"
        " that a failure ended, is continued by `llmevo resume`.",
        table(["status", "meaning"], [(f"{status}", meaning) for status, meaning in EXIT_STATUSES.items()]),
    ]
    return lines(*parts)


def event_name(model: type[BaseModel]) -> str:
    return str(model.model_fields["event"].default)


def events_page() -> str:
    parts: list[Any] = [
        "# Events",
        "A run's `events.jsonl` has one JSON object a line. Fields are added in later versions, and none is removed."
        " The schema of a line is [events.json](../schemas/events.json); [the log](../concepts/log.md) explains what is"
        " derived from it. Every event has `time` (UTC) and `schema` (1).",
        table(
            ["event", ""],
            [
                (f"[`{event_name(model)}`](#{event_name(model)})", text_of(model).partition("\n\n")[0])
                for model in event_models()
            ],
        ),
    ]
    for model in event_models():
        docs = field_docs(model)
        rows = [
            (f"`{name}`", form(field.annotation), docs.get(name, ""))
            for name, field in model.model_fields.items()
            if name not in ("event", "time", "schema_")
        ]
        parts += [f"## `{event_name(model)}`", text_of(model), table(["field", "value", ""], rows)]
    inner = {
        one for model in event_models() for field in model.model_fields.values() for one in models_in(field.annotation)
    }
    for model in sorted(inner, key=lambda one: one.__name__):
        docs = field_docs(model)
        rows = [(f"`{name}`", form(field.annotation), docs.get(name, "")) for name, field in model.model_fields.items()]
        parts += [f"## Section {model.__name__}", text_of(model), table(["field", "value", ""], rows)]
    return lines(*parts)


def optimizers_page() -> str:
    parts: list[Any] = [
        "# Optimizers",
        "The values of `search.optimizer` and of `--optimizer`. [The search](../concepts/search.md) explains what they"
        " have in common; [their benchmark](../benchmarks/optimizers.md) compares them.",
    ]
    for name, maker in every().items():
        asks = "It asks an LLM; see [LLMs and keys](../guides/llms.md)." if name in ASKING else ""
        parts += [f"## `{name}`", text_of(maker), *([asks] if asks else [])]
    return lines(*parts)


MOST_USED = ("evolve", "open_run", "Run", "merge", "extract", "Search")
"""Names of the Python API that come first in the reference."""


def python_page() -> str:
    names = [*MOST_USED, *(name for name in llmevo.__all__ if name not in (*MOST_USED, "__version__"))]
    parts: list[Any] = [
        "# Python API",
        "The names of `llmevo.__all__`. `import llmevo` loads no library; each name is imported when it is first used."
        " The package is typed.",
        *(f"::: {getattr(llmevo, name).__module__}.{name}\n    options: {{heading_level: 2}}" for name in names),
        "## `llmevo.testing`",
        text_of(testing),
        *(
            f"::: {getattr(testing, name).__module__}.{name}\n    options: {{heading_level: 3, members: false}}"
            for name in testing.__all__
        ),
    ]
    return lines(*parts)


# ---- merge methods


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(import_module(module)))


def method_texts(method: Method) -> tuple[str, str]:
    """The docstrings of a method's file and of its function: the idea and the paper, and the formula."""
    place = f"llmevo.merging.methods.{method.function or method.name}"
    tree = _tree(place)
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == method.name)
    return ast.get_docstring(tree) or "", ast.get_docstring(function) or ""


@cache
def uses() -> dict[str, str]:
    """{method: when to use it}, from the table of all methods."""
    rows = re.findall(r"^\| \[`(\w+)`\][^|]*\|[^|]*\| ([^|]+) \|$", (DOCS / "methods" / "index.md").read_text(), re.M)
    return dict(rows)


def genes_of(method: Method) -> list[str]:
    """The parameters that a search sets; none of a method that no search takes."""
    return [] if method.name == WIDEN else [name for name, own in declared_by(method).items() if own.is_gene]


def _parameter(method: Method, name: str, parameter: Parameter, of: str) -> list[str]:
    is_gene = name in genes_of(method)
    fixed = "no" if method.name == WIDEN else "no: `genome.parameters`"
    kept = "required" if parameter.default is None else f"{parameter.default}".lower()
    gene = f"{parameter.low:g} to {parameter.high:g}" if is_gene else fixed
    start = "" if not is_gene else "1/n" if parameter.start is None else f"{parameter.start:g}"
    return [f"`{name}`", parameter.meaning, of, kept, gene, start]


def _measured(file: str, method: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (RESULTS / file).read_text().splitlines()]
    return [row for row in rows if row.get("method") == method]


def _cost(method: Method) -> Iterator[str]:
    yield "## Cost"
    yield ""
    rows = _measured("merge.jsonl", method.name)
    if not rows:
        yield "Not measured."
    else:
        own = median(row["seconds"]["llmevo"] for row in rows)
        theirs = [row["seconds"]["mergekit"] for row in rows if "mergekit" in row["seconds"]]
        other = f"{median(theirs):.2f}" if theirs else "–"
        yield (
            f"{own:.2f} seconds a candidate at the quickstart's size, mergekit {other}: see"
            " [the benchmark of merging](../benchmarks/merging.md)."
        )
    yield ""


def _parity(method: Method) -> Iterator[str]:
    yield "## Parity"
    yield ""
    if not method.in_mergekit:
        yield "mergekit has no such method, and refuses a recipe that names it."
    elif rows := _measured("parity.jsonl", method.name):
        worst = max(row["difference"] for row in rows)
        said = (
            "equal to mergekit's result"
            if not worst
            else f"at most {worst:.0e} of a tensor's largest entry from mergekit's"
        )
        yield f"In float32 {said}, on {len(rows)} architectures: see [the table](../benchmarks/merging.md#parity)."
    else:
        yield "Not compared with mergekit."
    yield ""


def _models(method: Method) -> str:
    least, most = method.models
    count = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
    base = " and a base model" if method.takes_base or method.pair else ""
    optional = ", with or without a base model" if method.may_take_base else ""
    merges = f"It merges {count} {'model' if (least, most) == (1, 1) else 'models'}{base or optional}."
    if not walks(method):
        return merges
    return (
        f"{merges} In a search over two models it goes from the first to the second. Of more models each has a share"
        " `t` as its gene, and every slice merges the two with the highest, in the ratio of their shares."
    )


def method_page(method: Method) -> str:
    idea, formula = method_texts(method)
    genes = genes_of(method)
    parameters = [_parameter(method, name, own, "each model") for name, own in method.each.items()]
    parameters += [_parameter(method, name, own, "the merge") for name, own in method.shared.items()]
    searched = (
        f"Its genes are {', '.join(f'`{name}`' for name in genes)}; `genome.bounds` moves their bounds."
        if genes
        else "It has no gene: use it with `llmevo merge`"
        + (" or `llmevo dense`." if method.name == WIDEN else ", or as one of several methods.")
    )
    heads = ["parameter", "what it does", "of", "default in a recipe", "gene", "start"]
    return lines(
        f"# {method.name}",
        linked(idea),
        "## When to use it",
        f"Use it when {uses()[method.name]}.",
        "## Formula",
        linked(formula.removeprefix("Return ")),
        "x are a model's tensors, δ = x − base is its task vector, w its `weight` and λ `lambda`.",
        "## Parameters and genes",
        _models(method),
        *([table(heads, parameters)] if parameters else ["It has no parameters."]),
        searched,
        _cost(method),
        _parity(method),
        "## Reference",
        f"<{method.paper}>",
        "<!-- Written by docs/tools/site_reference.py. -->",
    )


if __name__ == "__main__":
    for page, content in method_pages().items():
        (DOCS / page).write_text(content)
