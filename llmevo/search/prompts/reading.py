"""Reading the answer of a chat model: whatever it is, it becomes proposals inside the bounds, or a reason why not.

Servers hold models to the schema only in part, and some not at all: everything is checked again here. What has one
meaning only is repaired, a row that is lost is taken from the best recipe, the rest is dropped and said.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from llmevo.errors import nearest
from llmevo.llm.json import numeral, objects, scalars, writable
from llmevo.search.evidence import Evidence, estimate_effects
from llmevo.search.prompts.names import Names
from llmevo.search.prompts.question import Question, Reading
from llmevo.search.prompts.table import GeneTable, scale
from llmevo.search.space import METHOD, Gene, Genes
from llmevo.search.trial import Suggestion


def choice_of(gene: Gene, value: Any) -> float:
    """The place of a choice that an answer names, or gives the place of. Raises ValueError for an unknown name."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return float(min(max(value, -1e6), 1e6))  # for the bounds; an integer of JSON may be too long for a float
    text = str(value)[:100].strip()
    if re.fullmatch(r"[0-9]{1,6}", text):
        return float(text)
    name = re.sub(r"[\s-]+", "_", text.lower())
    if name not in gene.choices:
        raise ValueError(f"{gene.parameter} {writable(text[:40])!r} is unknown{nearest(name, gene.choices)}")
    return float(gene.choices.index(name))


def admit(
    question: Question, rows: Sequence[Suggestion], problems: list[str], nearness: float = 0.01
) -> list[Suggestion]:
    """The validator's last step: into the bounds, and no repetition.

    A point whose genes all lie within `nearness` of their range from a known point is dropped: scoring it again
    would cost an evaluation and tell nothing. Genes that the chosen methods lack do not count. What is done is added
    to `problems`.
    """
    space = question.space
    names = {gene.name for gene in space.genes}
    known = [space.to_unit(t.candidate.genes) for t in question.trials if names <= t.candidate.genes.keys()]
    admitted: list[Suggestion] = []
    for row in rows:
        inside = space.clamp(row.genes)
        moved = [name for name, value in inside.items() if abs(value - row.genes[name]) > 1e-3]
        if moved:
            problems.append(f"clamped {len(moved)} of {len(inside)} genes into their bounds ({', '.join(moved[:3])})")
        point = space.to_unit(inside)
        active = space.active(inside)
        if any(abs(point - other)[active].max(initial=0.0) < nearness for other in known):
            problems.append("dropped a proposal that repeats a candidate")
            continue
        known.append(point)
        admitted.append(replace(row, genes=inside))
    return admitted[: question.wanted]


KINDS = ("refine", "crossover", "explore", "mean")


SPREADS = ("tighter", "same", "wider")


MOST = 20
"""Proposals that are looked at."""


GENOME = ("genome", "weights", "mean_genome")
"""What a table may be called. The last two names are those of the tools before this one, which models may have seen."""


EXTREME = 0.3
"""The share of numbers at a bound, without support, from which on an answer is remarked upon."""


def read(text: str, question: Question, sheet: GeneTable | None = None, evidence: Evidence | None = None) -> Reading:
    """Read an answer. `sheet` is the table it was asked for, all slices by default."""
    return _Reader(question, sheet or GeneTable.of(question.space, 0), evidence).read(text)


class _Reader:
    def __init__(self, question: Question, sheet: GeneTable, evidence: Evidence | None) -> None:
        self._question, self._sheet, self._evidence = question, sheet, evidence
        self._names = Names(question.space, question.tasks, question.mask_names)
        self._problems: list[str] = []

    def read(self, text: str) -> Reading:
        problems = self._problems
        answer, raw = _answer(text)
        if answer is None:
            return Reading(problems=["the answer holds no JSON object"])
        if len(raw) > MOST:
            problems.append(f"took the first {MOST} of {len(raw)} proposals")
        rows: list[Suggestion] = []
        for place, proposal in enumerate(raw[:MOST], start=1):
            try:
                rows.append(self._proposal(proposal))
            except ValueError as error:
                problems.append(f"dropped proposal {place}: {error}")
        if not rows and not problems:
            problems.append("the answer holds no proposal")
        admitted = admit(self._question, rows, problems)
        self._remark_on_extremes(admitted)
        if self._names.masked:  # whoever asks again quotes them to the LLM
            problems[:] = [self._names.text(problem, 400) for problem in problems]
        return Reading(admitted, writable(str(answer.get("analysis", "")))[:600], problems)

    def _proposal(self, raw: Any) -> Suggestion:
        """One proposal. Raises ValueError when it has no meaning, or several."""
        given: dict[str, Any] = raw if isinstance(raw, dict) else {"genome": raw}
        method = next((given[key] for key in (METHOD, "merge_methods", "method") if key in given), None)
        genome = next((given[key] for key in GENOME if key in given), None)
        kind = str(given.get("kind", ""))[:20].strip().lower()
        return Suggestion(
            self._genes(genome, method),
            "llm",
            writable(str(given.get("reason", "")))[:200],
            kind if kind in KINDS else "",
            self._predicted(given.get("predicted_score", given.get("predicted"))),
            self._spread(given.get("spread")),
        )

    def _genes(self, genome: Any, method: Any) -> Genes:
        sheet = self._sheet
        named = [*scalars(method)] if method is not None else []
        if isinstance(genome, dict):
            genome = self._by_slice(genome)
        values = [*scalars(genome)]
        if sheet.choices and not named and len(values) == len(sheet.numbers) + len(sheet.choices):
            # The methods stand in the table, each before the numbers it is for.
            genes = [gene for gene in self._question.space.genes if gene in sheet.numbers or gene in sheet.choices]
            named = [value for value, gene in zip(values, genes, strict=True) if gene.choices]
            genome = values = [value for value, gene in zip(values, genes, strict=True) if not gene.choices]
        width, count = len(sheet.columns), len(sheet.slices)
        if len(values) == len(sheet.numbers):
            rows: list[Any] = [values[place * width : (place + 1) * width] for place in range(count)]
        else:
            rows = [[*scalars(row)] for row in genome] if isinstance(genome, list) else []
            if count == 1 or len(rows) > count or not any(len(row) == width for row in rows):
                raise ValueError(f"it has {len(values)} numbers, the table {len(sheet.numbers)}")
        chosen = self._chosen(named)
        return {**self._question.incumbent, **chosen, **self._weights([*rows, *[[]] * (count - len(rows))])}

    def _by_slice(self, genome: dict[str, Any]) -> Any:
        """The rows of a table whose rows have names; a missing one is empty."""
        known = {shown: label for label, shown in self._names.slices.items()} | {s: s for s in self._sheet.slices}
        by_slice = {known[key]: row for key, row in genome.items() if key in known}
        return [by_slice.get(label, []) for label in self._sheet.slices] if by_slice else [*genome.values()]

    def _chosen(self, named: Sequence[Any]) -> Genes:
        choices, real = self._sheet.choices, {shown: name for name, shown in self._names.methods.items()}
        if len(named) == 1:
            named = [*named] * len(choices)  # one method named for all rows
        if len(named) != len(choices) and choices:
            raise ValueError(f"it names {len(named)} merge methods, {len(choices)} are wanted")
        values = [real.get(value, value) if isinstance(value, str) else value for value in named[: len(choices)]]
        return {gene.name: choice_of(gene, value) for gene, value in zip(choices, values, strict=True)}

    def _weights(self, rows: Sequence[Sequence[Any]]) -> Genes:
        """The numbers of every row that is whole; a row that is not is left out, and stays as it was."""
        sheet, width = self._sheet, len(self._sheet.columns)
        found: dict[Gene, float] = {}
        lost: dict[str, str] = {}
        for place, (label, row) in enumerate(zip(sheet.slices, rows, strict=True)):
            try:
                if len(row) != width:
                    raise ValueError(f"it has {len(row)} numbers, {width} are wanted")
                numbers = [numeral(value) for value in row]
            except ValueError as error:
                lost[label] = str(error)
                continue
            found |= zip(sheet.numbers[place * width : (place + 1) * width], numbers, strict=True)
        if not found and lost:
            raise ValueError(next(iter(lost.values())))
        if lost:
            label, why = next(iter(lost.items()))
            self._problems.append(f"took {len(lost)} of {len(rows)} rows from the best recipe ({label}: {why})")
        if self._decimals(found):
            self._problems.append("took decimals as values, not as hundredths")
            return {gene.name: value for gene, value in found.items()}
        return {gene.name: value / scale(gene) for gene, value in found.items()}

    def _decimals(self, found: dict[Gene, float]) -> bool:
        """Whether the numbers are plainly values, not hundredths: some are no integers, and all would be in place."""
        return any(value != int(value) for value in found.values()) and all(
            min(gene.low, 0.0) <= value <= (max(gene.high, 1.0) if scale(gene) == 100 else gene.high)
            for gene, value in found.items()
        )

    def _predicted(self, value: Any) -> float | None:
        if value is None:
            return None
        try:
            return numeral(value)
        except ValueError as error:
            self._problems.append(f"dropped a predicted score: {error}")
            return None

    def _spread(self, value: Any) -> tuple[str, ...]:
        """A word for every slice of the space; `same` for those that were not asked for, or not understood."""
        if isinstance(value, dict):
            value = self._by_slice(value)
        words = [word if word in SPREADS else "same" for word in (str(v)[:20].strip().lower() for v in scalars(value))]
        slices = self._sheet.slices
        words = words * len(slices) if len(words) == 1 else words
        if len(words) != len(slices) or value is None:
            return ()
        by_slice = dict(zip(slices, words, strict=True))
        return tuple(by_slice.get(label, "same") for label in self._question.space.slices)

    def _remark_on_extremes(self, rows: Sequence[Suggestion]) -> None:
        """LLMs like the ends of a scale. It is said and not mended: a zero may be meant, and the score will tell."""
        best = self._question.incumbent
        for place, row in enumerate(rows, start=1):
            ends = [g for g in self._sheet.numbers if row.genes[g.name] in (g.low, g.high)]
            bold = [g for g in ends if row.genes[g.name] != best[g.name]]
            if len(bold) > EXTREME * len(self._sheet.numbers):
                if self._evidence is None:
                    self._evidence = estimate_effects(self._question)
                strength = {effect.gene: effect.strength for effect in self._evidence.effects}
                backed = [g for g in bold if strength.get(g, 0.0) * (1 if row.genes[g.name] == g.high else -1) > 2]
                if len(bold) - len(backed) > EXTREME * len(self._sheet.numbers):
                    self._problems.append(
                        f"proposal {place} has {len(bold) - len(backed)} of {len(self._sheet.numbers)} numbers at their"
                        " lowest or highest without evidence for it"
                    )


def _answer(text: str) -> tuple[dict[str, Any] | None, list[Any]]:
    """The object that answers, and its proposals: those of an answer that was cut off as well."""
    found = objects(text)
    whole = [o for o in found if "proposals" in o]
    if whole:
        raw = whole[-1]["proposals"]
        return whole[-1], raw if isinstance(raw, list) else [raw]
    loose = [o for o in found if any(key in o for key in GENOME)]
    if loose:
        return loose[-1], loose
    return (found[-1], [found[-1]]) if found else (None, [])


def answer_model(question: Question, sheet: GeneTable | None = None) -> type[BaseModel]:
    """The pydantic model of the answer: every list of a fixed length, every integer bounded, nothing besides.

    Every field is required and texts have no longest length: OpenAI's strict mode refuses schemas that differ.
    """
    sheet = sheet or GeneTable.of(question.space, 0)
    low = min((round(gene.low * scale(gene)) for gene in sheet.numbers), default=0)
    high = max((round(gene.high * scale(gene)) for gene in sheet.numbers), default=0)
    integer: Any = Annotated[int, Field(ge=low, le=high)]
    slices = len(sheet.slices)
    fields: dict[str, Any] = {"reason": (str, ...), "kind": (Literal[KINDS], ...)}
    if sheet.choices:
        names = Names(question.space, question.tasks, question.mask_names)
        method: Any = Literal[tuple(names.methods[name] for name in sheet.choices[0].choices)]
        per_slice = question.space.genome.method_per_slice
        fields[METHOD] = (_list(method, slices) if per_slice else method, ...)
    fields["genome"] = (_list(_list(integer, len(sheet.columns)), slices), ...)
    fields["spread"] = (_list(Literal[SPREADS], slices), ...)
    fields["predicted_score"] = (float, ...)
    strict = ConfigDict(extra="forbid")
    proposal = create_model("Proposal", __config__=strict, **fields)
    proposals: Any = Annotated[list[proposal], Field(min_length=1, max_length=question.wanted)]
    return create_model("Answer", __config__=strict, analysis=(str, ...), proposals=(proposals, ...))


def _list(of: Any, length: int) -> Any:
    return Annotated[list[of], Field(min_length=length, max_length=length)]
