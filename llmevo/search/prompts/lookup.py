"""The genes, tasks and recipes that the words of an answer name."""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import product
from typing import Any, TypeVar

from llmevo.errors import nearest
from llmevo.llm.json import scalars, without_surrogates
from llmevo.search.genome import OTHER
from llmevo.search.prompts.names import Names
from llmevo.search.prompts.question import Question
from llmevo.search.prompts.table import GeneTable, scale
from llmevo.search.space import SHARES, Gene, Genes

T = TypeVar("T")

GAPS = 3  # marks of what was left out of a shortened name, at most


def word(value: Any) -> str:
    """Return a name of an answer for comparisons: short, on one line, in lower case."""
    return " ".join(without_surrogates(str(value)[:100]).casefold().split())


def find(value: Any, known: Mapping[str, T], kind: str, shown: Iterable[str]) -> T:
    """Return what a name stands for, the name of any case, or shortened by `…`. Raise ValueError with a hint of the
    names that are shown.
    """
    name = word(value)
    if name in known:
        return known[name]
    parts = name.replace("...", "…").split("…")
    if 1 < len(parts) <= GAPS + 1:
        pattern = re.compile(".*".join(map(re.escape, parts)))
        found = [of for form, of in known.items() if pattern.fullmatch(form)]
        if found and all(of == found[0] for of in found):
            return found[0]
    raise ValueError(f"{kind} {name[:40]!r} is unknown{nearest(name, shown)}"[:300])


def in_units(gene: Gene, values: Sequence[float]) -> list[float]:
    """Return values of one gene, or of like ones, of which all but zeros may be too large for anything but the table's
    hundredths.
    """
    most, factor = max(abs(gene.low), abs(gene.high)), scale(gene)
    sizes = [abs(value) for value in values if value]
    hundredths = bool(sizes) and min(sizes) > 2 * most and max(sizes) <= factor * most
    return [value / factor for value in values] if hundredths else [*values]


class Lookup:
    """The names of a prompt with this table, those of hidden rows included."""

    def __init__(self, question: Question, table: GeneTable, names: Names) -> None:
        self._question, self._table, self._names = question, table, names
        self.proposed: dict[int, Genes] = {}
        """The answer's own proposals by their places, counted from 1."""

    def _shown(self, names: Mapping[str, str], name: str) -> set[str]:
        """The forms of a name that the LLM may use."""
        return {names[name]} if self._names.masked else {names[name], name, self._names.earlier.get(name, name)}

    @cached_property
    def _columns(self) -> dict[str, list[Gene]]:
        """{form: genes}: `model.filter.parameter`, where any of the three may be missing."""
        numbers = [gene for gene in self._question.space.genes if not gene.choices and gene.slice is not None]
        main: dict[str | None, str] = {}
        for gene in sorted(numbers, key=lambda gene: gene.parameter not in SHARES):
            main.setdefault(gene.model, gene.parameter)
        filters = len(self._question.space.filters) > 1
        found: dict[str, list[Gene]] = {}
        for gene in numbers:
            models = {"all", "all models", ""} | (self._shown(self._names.models, gene.model) if gene.model else set())
            parts = {""} | (self._shown(self._names.filters, gene.filter or OTHER) if filters else set())
            parameters = self._shown(self._names.parameters, gene.parameter) | {"any"}
            parameters |= {""} if gene.parameter == main[gene.model] else set()
            for form in product(models, parts, parameters):
                found.setdefault(word(".".join(filter(None, form))), []).append(gene)
        return found

    def column(self, name: Any, rows: Any = None) -> list[Gene]:
        """Return the genes of a column in some rows. Raise ValueError for unknown names."""
        columns = (self._names.column(gene, len(self._question.space.filters) > 1) for gene in self._table.columns)
        shown = [*self._names.models.values(), *columns]
        slices = self.rows(rows)
        return [gene for gene in find(name, self._columns, "the column", shown) if gene.slice in slices]

    def select(self, said: Mapping[str, Any]) -> list[Gene]:
        """Return the genes of `model`, `filter`, `parameter` and `rows`: by default the weights of all models in all
        rows. Raise ValueError for unknown names.
        """
        others = [said[key] for key in ("filter", "parameter") if said.get(key)]
        models = [*scalars(said.get("model") or "all")][: len(self._names.models)]
        columns = [self.column(".".join(map(str, (model, *others))), said.get("rows")) for model in models]
        return [*dict.fromkeys(gene for column in columns for gene in column)]

    @property
    def methods(self) -> set[str]:
        """The names of the genes that choose a method."""
        return {gene.name for gene in self._question.space.genes if gene.choices}

    def rows(self, said: Any) -> list[str]:
        """Return the slices of some rows, by their numbers in the table or their names; all of the space by default."""
        labels = self._question.space.slices
        if said is None or said == [] or word(said) in ("all", ""):
            return labels
        own = self._table.slices
        known = {word(form): label for label in labels for form in self._shown(self._names.slices, label)}
        known |= {str(place): label for place, label in enumerate(own, start=1)}
        return [find(f"{row:g}" if isinstance(row, float) else row, known, "the row", known) for row in scalars(said)]

    def row(self, label: str | None) -> int:
        """Return a slice's number in the table, its first row having 1."""
        labels = self._question.space.slices
        return labels.index(label or labels[0]) - labels.index(self._table.slices[0]) + 1

    def depth(self, label: str | None) -> float:
        """Return the middle of a slice: 0 is the first layer, 1 the last."""
        space = self._question.space
        start, stop = space.spans[space.slices.index(label or space.slices[0])]
        return (start + stop - 1) / 2 / (space.layers - 1) if space.layers > 1 else 0.5

    def task(self, said: Any) -> str | None:
        """Return a task's real name, None for the total. Raise ValueError for an unknown one."""
        if said is None or word(said) in ("", "all", "score", "total", "null", "none"):
            return None
        names = self._names.tasks
        known = {word(form): task for task in names for form in self._shown(names, task)}
        return find(said, known, "the task", names.values())

    def recipe(self, said: Any) -> Genes:
        """Return the genes of `#12` (a scored candidate), `P2` (this answer's second proposal), `S1` (a suggestion of
        the statistics), `uniform` or `best`, which is the default. Raise ValueError for any other.
        """
        space, name = self._question.space, word("best" if said is None else said)
        if name in ("best", "uniform"):
            return self._question.incumbent if name == "best" else space.clamp(space.uniform())
        found = re.fullmatch(r"(#?|p|s) ?([0-9]{1,9})", name)
        if not found:
            raise ValueError(f"{name[:40]!r} names no recipe, as #12 or P1 would")
        kind, number = found[1], int(found[2])
        if kind == "p" and number in self.proposed:
            return self.proposed[number]
        if kind == "s" and 0 < number <= len(self._question.suggestions):
            return space.clamp(self._question.suggestions[number - 1][0])
        for trial in self._question.scored if kind in ("", "#") else ():
            if trial.candidate.id == number and {gene.name for gene in space.genes} <= trial.candidate.genes.keys():
                return trial.candidate.genes if trial.candidate.lies_in(space) else space.clamp(trial.candidate.genes)
        raise ValueError(f"{name[:40]!r} is no scored recipe with these parameters, and no usable proposal before it")
