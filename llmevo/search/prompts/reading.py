"""Reading the answer of a chat model: proposals inside the bounds, and the problems found.

Servers enforce the schema in part or not at all, so everything is checked here. Unambiguous faults are repaired, a lost
row is taken from the best recipe, and the rest is dropped with a message.
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
    """Return the place of a choice, given as its name or place. Raise ValueError for an unknown name."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return float(min(max(value, -1e6), 1e6))  # an integer of JSON may be too long for a float
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
    """Return the proposals moved into the bounds, without repetitions, and add each change to `problems`.

    A point is a repetition where all its genes are nearer to a known point than `nearness`, a share of their range;
    genes that the chosen methods lack do not count.
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
GENOME = ("genome", "weights", "mean_genome")  # keys of the table; the last two are other tools', which models may know
MOST = 20  # proposals that are read
EXTREME = 0.3  # the share of numbers at a bound, without evidence, above which a problem is reported


def read(text: str, question: Question, table: GeneTable | None = None, evidence: Evidence | None = None) -> Reading:
    """Read an answer. `table` is the table of the prompt, all slices by default."""
    return _Reader(question, table or GeneTable.of(question.space, 0), evidence).read(text)


class _Reader:
    def __init__(self, question: Question, table: GeneTable, evidence: Evidence | None) -> None:
        self._question, self._table, self._evidence = question, table, evidence
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
        if self._names.masked:  # the repair prompt quotes them
            problems[:] = [self._names.text(problem, 400) for problem in problems]
        return Reading(admitted, writable(str(answer.get("analysis", "")))[:600], problems)

    def _proposal(self, raw: Any) -> Suggestion:
        """One proposal. Raise ValueError when it is ambiguous or has no meaning."""
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
        table = self._table
        named = [*scalars(method)] if method is not None else []
        if isinstance(genome, dict):
            genome = self._by_slice(genome)
        values = [*scalars(genome)]
        if table.choices and not named and len(values) == len(table.numbers) + len(table.choices):
            # The methods are in the table, each before its numbers.
            genes = [gene for gene in self._question.space.genes if gene in table.numbers or gene in table.choices]
            named = [value for value, gene in zip(values, genes, strict=True) if gene.choices]
            genome = values = [value for value, gene in zip(values, genes, strict=True) if not gene.choices]
        width, count = len(table.columns), len(table.slices)
        if len(values) == len(table.numbers):
            rows: list[Any] = [values[place * width : (place + 1) * width] for place in range(count)]
        else:
            rows = [[*scalars(row)] for row in genome] if isinstance(genome, list) else []
            if count == 1 or len(rows) > count or not any(len(row) == width for row in rows):
                raise ValueError(f"it has {len(values)} numbers, the table {len(table.numbers)}")
        chosen = self._chosen(named)
        return {**self._question.incumbent, **chosen, **self._weights([*rows, *[[]] * (count - len(rows))])}

    def _by_slice(self, genome: dict[str, Any]) -> Any:
        """The rows of a table that has them by name; a missing one is empty."""
        known = {shown: label for label, shown in self._names.slices.items()} | {s: s for s in self._table.slices}
        by_slice = {known[key]: row for key, row in genome.items() if key in known}
        return [by_slice.get(label, []) for label in self._table.slices] if by_slice else [*genome.values()]

    def _chosen(self, named: Sequence[Any]) -> Genes:
        choices, real = self._table.choices, {shown: name for name, shown in self._names.methods.items()}
        if len(named) == 1:
            named = [*named] * len(choices)  # one method named for all rows
        if len(named) != len(choices) and choices:
            raise ValueError(f"it names {len(named)} merge methods, {len(choices)} are wanted")
        values = [real.get(value, value) if isinstance(value, str) else value for value in named[: len(choices)]]
        return {gene.name: choice_of(gene, value) for gene, value in zip(choices, values, strict=True)}

    def _weights(self, rows: Sequence[Sequence[Any]]) -> Genes:
        """The genes of every complete row."""
        table, width = self._table, len(self._table.columns)
        found: dict[Gene, float] = {}
        lost: dict[str, str] = {}
        for place, (label, row) in enumerate(zip(table.slices, rows, strict=True)):
            try:
                if len(row) != width:
                    raise ValueError(f"it has {len(row)} numbers, {width} are wanted")
                numbers = [numeral(value) for value in row]
            except ValueError as error:
                lost[label] = str(error)
                continue
            found |= zip(table.numbers[place * width : (place + 1) * width], numbers, strict=True)
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
        """True if the numbers are values, not hundredths: some are no integers, and all are inside the bounds."""
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
        """A word for every slice of the space; `same` where the answer has none."""
        if isinstance(value, dict):
            value = self._by_slice(value)
        words = [word if word in SPREADS else "same" for word in (str(v)[:20].strip().lower() for v in scalars(value))]
        slices = self._table.slices
        words = words * len(slices) if len(words) == 1 else words
        if len(words) != len(slices) or value is None:
            return ()
        by_slice = dict(zip(slices, words, strict=True))
        return tuple(by_slice.get(label, "same") for label in self._question.space.slices)

    def _remark_on_extremes(self, rows: Sequence[Suggestion]) -> None:
        """Report numbers at their bounds, which LLMs prefer; they are kept, for a zero may be meant."""
        best = self._question.incumbent
        for place, row in enumerate(rows, start=1):
            ends = [g for g in self._table.numbers if row.genes[g.name] in (g.low, g.high)]
            bold = [g for g in ends if row.genes[g.name] != best[g.name]]
            if len(bold) > EXTREME * len(self._table.numbers):
                if self._evidence is None:
                    self._evidence = estimate_effects(self._question)
                strength = {effect.gene: effect.strength for effect in self._evidence.effects}
                backed = [g for g in bold if strength.get(g, 0.0) * (1 if row.genes[g.name] == g.high else -1) > 2]
                if len(bold) - len(backed) > EXTREME * len(self._table.numbers):
                    self._problems.append(
                        f"proposal {place} has {len(bold) - len(backed)} of {len(self._table.numbers)} numbers at their"
                        " lowest or highest without evidence for it"
                    )


def _answer(text: str) -> tuple[dict[str, Any] | None, list[Any]]:
    """The answering object and its proposals, those of a truncated answer included."""
    found = objects(text)
    whole = [o for o in found if "proposals" in o]
    if whole:
        raw = whole[-1]["proposals"]
        return whole[-1], raw if isinstance(raw, list) else [raw]
    loose = [o for o in found if any(key in o for key in GENOME)]
    if loose:
        return loose[-1], loose
    return (found[-1], [found[-1]]) if found else (None, [])


def answer_model(question: Question, table: GeneTable | None = None) -> type[BaseModel]:
    """Return the pydantic model of the answer: every list has a fixed length and every integer bounds.

    Every field is required and texts have no maximum length, as OpenAI's strict mode wants.
    """
    table = table or GeneTable.of(question.space, 0)
    low = min((round(gene.low * scale(gene)) for gene in table.numbers), default=0)
    high = max((round(gene.high * scale(gene)) for gene in table.numbers), default=0)
    integer: Any = Annotated[int, Field(ge=low, le=high)]
    slices = len(table.slices)
    fields: dict[str, Any] = {"reason": (str, ...), "kind": (Literal[KINDS], ...)}
    if table.choices:
        names = Names(question.space, question.tasks, question.mask_names)
        method: Any = Literal[tuple(names.methods[name] for name in table.choices[0].choices)]
        per_slice = question.space.genome.method_per_slice
        fields[METHOD] = (_list(method, slices) if per_slice else method, ...)
    fields["genome"] = (_list(_list(integer, len(table.columns)), slices), ...)
    fields["spread"] = (_list(Literal[SPREADS], slices), ...)
    fields["predicted_score"] = (float, ...)
    strict = ConfigDict(extra="forbid")
    proposal = create_model("Proposal", __config__=strict, **fields)
    proposals: Any = Annotated[list[proposal], Field(min_length=1, max_length=question.wanted)]
    return create_model("Answer", __config__=strict, analysis=(str, ...), proposals=(proposals, ...))


def _list(of: Any, length: int) -> Any:
    return Annotated[list[of], Field(min_length=length, max_length=length)]
