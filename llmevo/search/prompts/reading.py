"""Reading the answer of a chat model: proposals inside the bounds, and the problems found.

Servers enforce the schema in part or not at all, so everything is checked here. Unambiguous faults are repaired, a lost
row is taken from the best recipe, and the rest is dropped with a message.
"""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import takewhile
from typing import Any, TypeVar

from llmevo.errors import nearest
from llmevo.llm.json import numeral, objects, scalars, without_surrogates
from llmevo.search.evidence import Evidence, ceiling, estimate_effects
from llmevo.search.prompts.lookup import Lookup, in_units, word
from llmevo.search.prompts.moves import recipes_of, with_columns
from llmevo.search.prompts.names import Names
from llmevo.search.prompts.question import Belief, Hypothesis, Question, Reading
from llmevo.search.prompts.table import GeneTable, scale
from llmevo.search.space import METHOD, SPLIT, Array, Gene, Genes, SearchSpace
from llmevo.search.trial import Suggestion

T = TypeVar("T")


KINDS = ("refine", "crossover", "explore", "mean")  # of older logs
PURPOSES = ("exploit", "learn")
DIRECTIONS = {"higher": 1, "lower": -1, "stay": 0}
SPREADS = ("tighter", "same", "wider")
GENOME = ("genome", "weights", "mean_genome")  # keys of the table; the last two are other tools', which models may know
RECIPES = (*GENOME, "depth", "move")  # keys of a proposal's recipe
MOST = 20  # proposals that are read
BELIEFS, HYPOTHESES, MOVES = 12, 6, 8  # that are read
TOTAL = ("score", "total")  # keys of the predicted total
ANALYSIS = 800  # characters that are kept
LARGEST = 1e6  # predicted score that is read
REPETITION = 0.01  # the distance from a known point, as a share of a gene's range, below which a point repeats it
EXTREME = 0.3  # the share of numbers at a bound, without evidence, above which a problem is reported


def choice_of(gene: Gene, value: Any) -> float:
    """Return the place of a choice, given as its name or place. Raise ValueError for an unknown name."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return float(min(max(value, -1e6), 1e6))  # an integer of JSON may be too long for a float
    text = str(value)[:100].strip()
    if re.fullmatch(r"[0-9]{1,6}", text):
        return float(text)
    name = re.sub(r"[\s-]+", "_", text.lower())
    if name not in gene.choices:
        raise ValueError(f"{gene.parameter} {without_surrogates(text[:40])!r} is unknown{nearest(name, gene.choices)}")
    return float(gene.choices.index(name))


def predicted_by(question: Question, value: Any) -> float:
    """Return a score that an answer predicts. Raise ValueError for anything that is no number, or too large for one."""
    number = numeral(value)
    if abs(number) > LARGEST and not question.before_rules_4:
        raise ValueError(f"{str(value)[:20]} is no score")
    return number


def admit(question: Question, rows: Sequence[Suggestion], problems: list[str]) -> list[Suggestion]:
    """Return the proposals moved into the bounds, without repetitions, and add each change to `problems`.

    A point is a repetition where all its genes are nearer to a known point than `REPETITION`, a share of their range;
    genes that the chosen methods lack do not count.
    """
    space = question.space
    known = [space.to_unit(genes) for genes in _known(question)]
    admitted: list[Suggestion] = []
    for row in rows:
        inside = space.clamp(row.genes)
        moved = [name for name, value in inside.items() if abs(value - row.genes[name]) > 1e-3]
        if moved:
            problems.append(f"clamped {len(moved)} of {len(inside)} genes into their bounds ({', '.join(moved[:3])})")
        if _repeated(space, inside, known) is not None:
            problems.append("dropped a proposal that repeats a candidate")
            continue
        known.append(space.to_unit(inside))
        admitted.append(replace(row, genes=inside))
    return admitted[: question.wanted]


def _known(question: Question) -> list[Genes]:
    """The genes of all trials that have them all, failures included."""
    names = {gene.name for gene in question.space.genes}
    return [trial.candidate.genes for trial in question.trials if names <= trial.candidate.genes.keys()]


def _repeated(space: SearchSpace, genes: Genes, known: Sequence[Array]) -> int | None:
    """The place of the known point that a recipe repeats."""
    point, active = space.to_unit(genes), space.active(genes)
    near = (place for place, other in enumerate(known) if abs(point - other)[active].max(initial=0.0) < REPETITION)
    return next(near, None)


def read(text: str, question: Question, table: GeneTable | None = None, evidence: Evidence | None = None) -> Reading:
    """Read an answer. `table` is the table of the prompt, all slices by default."""
    return _Reader(question, table or GeneTable.of(question.space, 0), evidence).read(text)


class _Reader:
    def __init__(self, question: Question, table: GeneTable, evidence: Evidence | None) -> None:
        self._question, self._table, self._evidence = question, table, evidence
        self._names = Names(question.space, question.tasks, question.mask_names)
        self._words = Lookup(question, self._table, self._names)
        self._problems: list[str] = []
        self._moves = 0
        self._decimal = False
        """Whether all tables of the answer hold decimals."""
        self._points = [question.space.to_unit(genes) for genes in _known(question)]

    def read(self, text: str) -> Reading:
        problems = self._problems
        answer, raw = _answer(text, self._question.before_rules_4)
        if answer is None:
            return Reading(problems=["the answer holds no JSON object"])
        if len(raw) > MOST:
            problems.append(f"took the first {MOST} of {len(raw)} proposals")
        if not self._question.before_rules_4:
            self._decimal = self._all_decimals(raw[:MOST])
        rows: list[Suggestion] = []
        for place, proposal in enumerate(raw[:MOST], start=1):
            try:
                found = self._proposals(proposal)
                self._words.proposed[place] = self._settled(found[0].genes)
                rows += found
            except ValueError as error:
                problems.append(f"dropped proposal {place}: {error}")
        beliefs = self._each(answer.get("beliefs"), "belief", BELIEFS, self._belief)
        hypotheses = self._each(answer.get("hypotheses"), "hypothesis", HYPOTHESES, self._hypothesis)
        if not (rows or beliefs or hypotheses or problems):
            problems.append("the answer holds no proposal")
        admitted = admit(self._question, rows, problems)
        self._remark_on_extremes(admitted)
        if self._names.masked:  # the repair prompt quotes them
            problems[:] = [self._names.text(problem, 400) for problem in problems]
        analysis = without_surrogates(str(answer.get("analysis") or ""))[:ANALYSIS]
        return Reading(admitted, analysis, problems, beliefs, hypotheses)

    def _each(self, said: Any, kind: str, most: int, reader: Callable[[dict[str, Any]], T]) -> list[T]:
        """The usable entries of a list."""
        found: list[T] = []
        entries: list[Any] = said if isinstance(said, list) else [] if said is None else [said]
        if len(entries) > most:
            self._problems.append(f"took the first {most} of {len(entries)} entries, each a {kind}")
        for place, entry in enumerate(entries[:most], start=1):
            try:
                if not isinstance(entry, dict):
                    raise ValueError("it is no object")
                found.append(reader(entry))
            except ValueError as error:
                self._problems.append(f"dropped {kind} {place}: {error}")
        return found

    def _settled(self, genes: Genes) -> Genes:
        """The genes inside the bounds, of the candidate that they repeat if there is one."""
        place = _repeated(self._question.space, genes, self._points)
        return self._question.space.clamp(genes) if place is None else _known(self._question)[place]

    def _belief(self, said: dict[str, Any]) -> Belief:
        genes = self._words.select(said)
        if not genes:
            raise ValueError("it is about no parameter")
        direction = word(said.get("direction") or "")[:40]
        if direction and direction not in DIRECTIONS:
            raise ValueError(f"the direction {direction!r} is unknown{nearest(direction, DIRECTIONS)}")
        ends = [numeral(end) for end in scalars(said.get("range") if said.get("range") is not None else [])]
        if said.get("value") is not None:
            ends = [numeral(said["value"])]
        if not ends and not direction:
            raise ValueError("it has neither a direction nor a value")
        if len(ends) > 2:
            raise ValueError("a range has a lowest and a highest value")
        low, high = min(gene.low for gene in genes), max(gene.high for gene in genes)
        ends = sorted(min(max(end, low), high) for end in in_units(genes[0], ends))
        task = said.get("task")
        self._words.task(task)  # an unknown one: the LLM speaks of another question
        text = ": ".join(str(part)[:200] for part in (task, said.get("why")) if part)
        return Belief(
            tuple(gene.name for gene in genes),
            0 if ends else DIRECTIONS[direction],
            sum(ends) / len(ends) if ends else None,
            (ends[1] - ends[0]) / 2 if len(ends) == 2 else None,
            self._confidence(said.get("confidence")),
            without_surrogates(text)[:200],
        )

    def _confidence(self, said: Any) -> float:
        """From 0 to 1; a half where there is none. Percents are understood."""
        try:
            value = 0.5 if said is None else numeral(said)
        except ValueError as error:
            self._problems.append(f"dropped a confidence: {error}")
            return 0.5
        return min(max(value / 100 if 1 < value <= 100 else value, 0.0), 1.0)

    def _hypothesis(self, said: dict[str, Any]) -> Hypothesis:
        better, worse = (self._words.recipe("" if said.get(key) is None else said[key]) for key in ("better", "worse"))
        if better == worse:
            raise ValueError("it compares a recipe with itself")
        return Hypothesis(
            without_surrogates(str(said.get("claim") or ""))[:200], self._words.task(said.get("task")), better, worse
        )

    def _proposals(self, raw: Any) -> list[Suggestion]:
        """One proposal, or one for each step of a move. Raise ValueError when it is ambiguous or has no meaning."""
        given: dict[str, Any] = raw if isinstance(raw, dict) else {"genome": raw}
        recipes = self._recipes(given)
        kind, purpose = (str(given.get(key, ""))[:20].strip().lower() for key in ("kind", "purpose"))
        said = given.get("predicted_score", given.get("predicted"))
        scores = said if isinstance(said, dict) else {"score": said}
        predicted = self._predicted_tasks({key: of for key, of in scores.items() if word(key) not in TOTAL})
        suggestion = Suggestion(
            {},
            "llm",
            without_surrogates(str(given.get("reason", "")))[:200],
            kind if kind in KINDS else "",
            self._predicted(next((of for key, of in scores.items() if word(key) in TOTAL), None)),
            self._spread(given.get("spread")),
            purpose if purpose in PURPOSES else "",
            predicted,
        )
        return [replace(suggestion, genes={**genes, **self._split(given)}) for genes in recipes]

    def _split(self, given: dict[str, Any]) -> Genes:
        """The layer at which the models change roles; the best recipe's where the answer has none."""
        if not self._question.space.genome.split or given.get(SPLIT) is None:
            return {}
        try:
            return {SPLIT: numeral(given[SPLIT])}
        except ValueError as error:
            self._problems.append(f"took the split of the best recipe: {error}")
            return {}

    def _recipes(self, given: dict[str, Any]) -> list[Genes]:
        method, used = _method_of(given), _form_of(given)
        if used not in ("depth", "move"):
            return [self._genes(_genome_of(given), method)]
        named = [*scalars(method)] if method is not None else []
        chosen = self._chosen(named) if named else {}
        if used == "depth":
            found = [with_columns(self._words, self._question.incumbent, given["depth"], None, self._problems)]
        else:
            self._moves += 1
            if self._moves > MOVES:
                raise ValueError(f"an answer has at most {MOVES} moves")
            found = recipes_of(self._words, given["move"], self._problems)
        return [{**genes, **chosen} for genes in found]

    def _genes(self, genome: Any, method: Any) -> Genes:
        rows, named = self._rows(genome, method)
        return {**self._question.incumbent, **self._chosen(named), **self._weights(rows)}

    def _rows(self, genome: Any, method: Any) -> tuple[list[Sequence[Any]], list[Any]]:
        """The rows of a table, empty where they are missing, and the names of its methods."""
        table = self._table
        named = [*scalars(method)] if method is not None else []
        if not self._question.before_rules_4:
            genome = self._by_position(genome)
        elif isinstance(genome, dict):
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
        return [*rows, *[[]] * (count - len(rows))], named

    def _by_position(self, genome: Any) -> Any:
        """A table as a list of rows, whose rows, columns and numbers may have names. It may be a text of JSON."""
        if isinstance(genome, str):
            with suppress(ValueError, RecursionError):
                genome = json.loads(genome)
        if genome in (None, "", [], {}):
            raise ValueError("it has no genome")
        if isinstance(genome, dict):
            genome = self._by_name(genome)
        if not isinstance(genome, list):
            return genome
        return [self._row(row) if isinstance(row, dict) else row for row in genome]

    def _by_name(self, genome: dict[str, Any]) -> list[Any]:
        """The rows of a table that has rows or columns by name; a missing row is empty. Raise ValueError for a name of
        neither.
        """
        slices, inner = self._table.slices, next(iter(genome.values()))
        labels = [*takewhile(bool, map(self._labels, genome))]
        lists = all(isinstance(row, list | dict) for row in genome.values())
        if len(labels) == len(genome) and (lists or len(self._table.columns) == 1):
            by_row = {label: row for row, of in zip(genome.values(), labels, strict=True) for label in of}
            return [by_row.get(label, []) for label in slices]
        try:
            columns = {name: [*scalars(of)] for name, of in _columns(genome).items()}
            if any(len(of) not in (1, len(slices)) for of in columns.values()):
                raise ValueError(f"a column has as many numbers as there are rows, which are {len(slices)}")
            return [
                self._row({name: of[place % len(of)] for name, of in columns.items()}) for place in range(len(slices))
            ]
        except ValueError:
            if len(genome) == 1 and isinstance(inner, list):  # such as {"rows": [[…], …]}
                return inner
            raise

    def _labels(self, name: str) -> list[str]:
        """The slices of a row's name, such as `row 2`; none where it names no row."""
        try:
            return self._words.rows(re.sub(r"^row\s*(?=\d)", "", word(name)))
        except ValueError:
            return []

    def _row(self, named: dict[str, Any]) -> list[Any]:
        """The numbers of a row that has them by the names of the columns."""
        found = _columns(named).items()
        by_gene = {gene.name: value for name, value in found for gene in self._words.column(name)}
        columns, filters = self._table.columns, len(self._question.space.filters) > 1
        if missing := [self._names.column(gene, filters) for gene in columns if gene.name not in by_gene]:
            raise ValueError(f"a row has no {', '.join(missing)}"[:200])
        return [by_gene[gene.name] for gene in columns]

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
        found, lost = self._numbers(rows)
        if not found and lost:
            raise ValueError(next(iter(lost.values())))
        if lost:
            label, why = next(iter(lost.items()))
            self._problems.append(f"took {len(lost)} of {len(rows)} rows from the best recipe ({label}: {why})")
        if _lie_inside(found) and (self._decimal or any(not value.is_integer() for value in found.values())):
            self._problems.append("took decimals as values, not as hundredths")
            return {gene.name: value for gene, value in found.items()}
        return {gene.name: value / scale(gene) for gene, value in found.items()}

    def _numbers(self, rows: Sequence[Sequence[Any]]) -> tuple[dict[Gene, float], dict[str, str]]:
        """The numbers of the complete rows; and why each other row cannot be used."""
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
        return found, lost

    def _all_decimals(self, proposals: Sequence[Any]) -> bool:
        """True if the tables of an answer hold values, not hundredths: some numbers are written with a point, and all
        are inside the bounds.
        """
        pointed = False
        for proposal in proposals:
            given: dict[str, Any] = proposal if isinstance(proposal, dict) else {"genome": proposal}
            if _form_of(given) in ("depth", "move"):
                continue
            try:
                rows, _ = self._rows(_genome_of(given), _method_of(given))
            except ValueError:
                continue
            if not _lie_inside(self._numbers(rows)[0]):
                return False
            pointed |= any(isinstance(v, float) or (isinstance(v, str) and "." in v) for v in scalars([*rows]))
        return pointed

    def _predicted(self, value: Any) -> float | None:
        if value is None:
            return None
        try:
            number = predicted_by(self._question, value)
        except ValueError as error:
            self._problems.append(f"dropped a predicted score: {error}")
            return None
        if self._question.before_rules_4 or not max(1.0, ceiling(self._question)) < number <= 100:
            return number
        totals = [trial.score.total for trial in self._question.scored if trial.score]
        shares = all(map(self._is_share, self._question.tasks)) and all(0 <= total <= 1 for total in totals)
        return number / 100 if shares else number

    def _predicted_tasks(self, said: dict[str, Any]) -> dict[str, float]:
        """{task: predicted score}; hundredths where no score of it is above 1."""
        found: dict[str, float] = {}
        for key, value in [*said.items()][: len(self._question.tasks)]:
            if value is None:
                continue
            try:
                task, number = self._words.task(key), predicted_by(self._question, value)
            except ValueError as error:
                self._problems.append(f"dropped a predicted score: {error}")
                continue
            if task is not None:
                found[task] = number / 100 if 1 < number <= 100 and self._is_share(task) else number
        return found

    def _is_share(self, task: str) -> bool:
        metric = self._question.tasks[task][1]
        values = [trial.score.tasks.get(task, {}).get(metric, 0.0) for trial in self._question.scored if trial.score]
        return all(0 <= value <= 1 for value in values)

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


def _method_of(given: dict[str, Any]) -> Any:
    """What a proposal says of its merge methods."""
    return next((given[key] for key in (METHOD, "merge_methods", "method") if key in given), None)


def _form_of(given: dict[str, Any]) -> str | None:
    """The key of a proposal's recipe."""
    return next((key for key in RECIPES if given.get(key) not in (None, [], {}, "")), None)


def _genome_of(given: dict[str, Any]) -> Any:
    """A proposal's table."""
    return next((given[key] for key in GENOME if key in given), None)


def _columns(said: dict[str, Any]) -> dict[str, Any]:
    """{column: value} of {column: value} or {model: {parameter: value}}."""
    found: dict[str, Any] = {}
    for name, value in said.items():
        found |= {f"{name}.{key}": of for key, of in value.items()} if isinstance(value, dict) else {name: value}
    return found


def _lie_inside(found: dict[Gene, float]) -> bool:
    """True if numbers of a table may be values, not hundredths: all are inside the bounds."""
    return all(
        min(gene.low, 0.0) <= value <= (max(gene.high, 1.0) if scale(gene) == 100 else gene.high)
        for gene, value in found.items()
    )


def _answer(text: str, before_rules_4: bool = False) -> tuple[dict[str, Any] | None, list[Any]]:
    """The answering object and its proposals, those of a truncated answer included."""
    found = objects(text)
    whole = [o for o in found if "proposals" in o]
    if not before_rules_4:
        whole = whole or [o for one in found for o in one.values() if isinstance(o, dict) and "proposals" in o]
        whole = [o for o in whole if o["proposals"]] or whole
    if whole:
        raw = whole[-1]["proposals"]
        if raw is None and (whole[-1].get("beliefs") or whole[-1].get("hypotheses")):
            raw = []
        return whole[-1], raw if isinstance(raw, list) else [raw]
    loose = [o for o in found if any(key in o for key in RECIPES)]
    beliefs = [o for o in found if "direction" in o]
    if loose:
        return {**loose[-1], **({"beliefs": beliefs} if beliefs else {})}, loose
    said = [o for o in found if "beliefs" in o or "hypotheses" in o]
    if said or beliefs:
        return said[-1] if said else {"beliefs": beliefs}, []
    return (found[-1], [found[-1]]) if found else (None, [])
