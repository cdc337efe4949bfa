"""Recipes that an LLM gives by expressions of depth, or by their difference from a scored recipe."""

from collections.abc import Iterator, Mapping
from typing import Any

from llmevo.llm.json import numeral, scalars, without_surrogates
from llmevo.search.prompts.expressions import Expression
from llmevo.search.prompts.lookup import Lookup, in_units
from llmevo.search.space import Gene, Genes

COLUMNS = 64  # columns that are read
STEPS = 4  # recipes of a move, at most
FARTHEST = 3.0  # the longest step, as a share of the way
FACTOR = 10.0  # the largest


def with_columns(words: Lookup, start: Genes, said: Any, rows: Any, problems: list[str]) -> Genes:
    """Return a recipe with other values in the named columns, numbers or expressions. Raise ValueError where none is
    usable; of several, each that is not is a problem.
    """
    found: Genes = {}
    lost: list[str] = []
    for column, value in _pairs(said):
        try:
            found |= _values(words, words.column(column, rows), value)
        except ValueError as error:
            lost.append(f"{without_surrogates(str(column)[:40])!r}: {error}")
    if not found:
        raise ValueError(lost[0] if lost else "it names no column")
    problems += [f"left out the column {problem}" for problem in lost]
    return {**start, **found}


def _pairs(said: Any) -> Iterator[tuple[Any, Any]]:
    """{column: value} or [{"column": column, "expression": value}]: strict schemas have no free keys."""
    if isinstance(said, dict):
        yield from [*said.items()][:COLUMNS]
    for entry in said[:COLUMNS] if isinstance(said, list) else ():
        if isinstance(entry, dict):
            yield entry.get("column"), entry.get("expression", entry.get("value"))


def _values(words: Lookup, genes: list[Gene], said: Any) -> Genes:
    if isinstance(said, str):
        expression = Expression(said)
        values = [expression.value(words.depth(gene.slice), words.row(gene.slice)) for gene in genes]
    else:
        values = [numeral(said)] * len(genes)
    return dict(zip((gene.name for gene in genes), in_units(genes[0], values) if genes else (), strict=True))


def recipes_of(words: Lookup, said: Any, problems: list[str]) -> list[Genes]:
    """Return the recipes of a move, one for every step: `from` a recipe `towards` another, and then `set` columns and
    `scale` them by a factor. Raise ValueError where that changes nothing or names something unknown.
    """
    if not isinstance(said, dict):
        raise ValueError("a move is an object")
    if not any(said.get(key) for key in ("towards", "set", "scale")):
        raise ValueError("the move has none of towards, set and scale")
    recipes = [words.recipe(said.get("from"))]
    if said.get("towards"):
        recipes = _steps(words, recipes[0], said, problems)
    if said.get("set"):
        recipes = [with_columns(words, genes, said["set"], said.get("rows"), problems) for genes in recipes]
    entries = said.get("scale") or []
    for entry in (entries if isinstance(entries, list) else [entries])[:COLUMNS]:
        if not isinstance(entry, dict):
            raise ValueError("scale is an object with model, rows and by")
        factor = numeral(entry.get("by"))
        if abs(factor) > FACTOR:
            raise ValueError(f"a factor is at most {FACTOR:g}")
        names = [gene.name for gene in words.select({"rows": said.get("rows"), **entry})]
        recipes = [{**genes, **{name: factor * genes[name] for name in names}} for genes in recipes]
    return recipes


def _steps(words: Lookup, start: Genes, said: Mapping[str, Any], problems: list[str]) -> list[Genes]:
    aim, where = words.recipe(said["towards"]), {key: said.get(key) for key in ("model", "filter", "parameter", "rows")}
    if not any(where.values()):
        where["parameter"] = "any"
    steps = [numeral(step) for step in scalars(0.5 if said.get("steps") is None else said["steps"])]
    if not steps or any(abs(step) > FARTHEST for step in steps):
        raise ValueError(f"steps are shares of the way, at most {FARTHEST:g}")
    if len(steps) > STEPS:
        problems.append(f"took the first {STEPS} of {len(steps)} steps")
    names = [gene.name for gene in words.select(where)]
    # Methods are not between one another: the nearer recipe's, if the whole recipe moves.
    methods = {name: value for name, value in aim.items() if name in words.methods} if where["rows"] is None else {}
    return [
        {**start, **(methods if step > 0.5 else {}), **{n: start[n] + step * (aim[n] - start[n]) for n in names}}
        for step in steps[:STEPS]
    ]
