"""For chat models: tables with names, answered in JSON.

Genes are shown as hundredths (weight 100 is the whole task vector): integers, because models continue and
compare integers far better than decimals (EvoLLM, https://arxiv.org/abs/2402.18381, section 3). What stays small
is shown finer, as thousandths and so on. Where there are several merge methods, their names stand beside the table.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from llmevo.genes import METHOD, Gene, Genes
from llmevo.prompting.question import Prompt, Question, Reading, Templates, admit, choice_of, writable
from llmevo.space import SearchSpace

FILES = ("chat_system.j2", "chat_user.j2")
SCALE = 100
"""Weights and densities are hundredths; so is what reaches up to a half or further."""


def ask(question: Question, templates: Templates, seed: int) -> Prompt:
    """The prompt for a chat model."""
    space = question.space
    numbers, choices = _numeric(space), _choices(space)
    schema = answer_model(question).model_json_schema()
    variables: dict[str, Any] = {
        "q": question,
        "columns": [gene for gene in numbers if gene.slice == space.slices[0]],
        "rows": [(trial, _table(space, trial.candidate.genes)) for trial in question.elites],
        "low": {g.parameter: round(g.low * scale(g)) for g in numbers},
        "high": {g.parameter: round(g.high * scale(g)) for g in numbers},
        "scale": {g.parameter: scale(g) for g in numbers},
        "choices": choices[0].choices if choices else (),
        "chosen": {
            trial.candidate.id: [gene.shown(trial.candidate.genes[gene.name]) for gene in choices]
            for trial in question.elites
        },
        "schema": json.dumps(schema),
    }
    messages = (
        {"role": "system", "content": templates.render(FILES[0], **variables)},
        {"role": "user", "content": templates.render(FILES[1], **variables)},
    )
    return Prompt(messages, lambda text: read(text, question), schema=schema, generation=question.generation, seed=seed)


def scale(gene: Gene) -> int:
    """What a gene is multiplied by to be shown: 100, or more where it stays under a half."""
    if gene.parameter in ("weight", "density"):
        return SCALE
    return SCALE * 10 ** max(0, math.ceil(-math.log10(2 * max(abs(gene.low), abs(gene.high))) - 1e-9))


def _numeric(space: SearchSpace) -> list[Gene]:
    """The genes of the table: all but choices."""
    return [gene for gene in space.genes if not gene.choices]


def _choices(space: SearchSpace) -> list[Gene]:
    """The genes that choose a method: none, one for the recipe, or one for every slice."""
    return [gene for gene in space.genes if gene.choices]


def _table(space: SearchSpace, genes: Genes) -> list[tuple[str, list[int]]]:
    """(slice, integers) for every slice."""
    numbers = _numeric(space)
    return [(label, [round(genes[g.name] * scale(g)) for g in numbers if g.slice == label]) for label in space.slices]


def answer_model(question: Question) -> type[BaseModel]:
    """The pydantic model of the answer: every list of a fixed length, every integer bounded, nothing besides."""
    space = question.space
    numbers, choices = _numeric(space), _choices(space)
    low = min((round(gene.low * scale(gene)) for gene in numbers), default=0)
    high = max((round(gene.high * scale(gene)) for gene in numbers), default=0)
    columns, slices = len(numbers) // len(space.slices), len(space.slices)
    integer: Any = Annotated[int, Field(ge=low, le=high)]
    row: Any = Annotated[list[integer], Field(min_length=columns, max_length=columns)]
    fields: dict[str, Any] = {"reason": (str, Field(max_length=200))}
    if choices:
        name: Any = Literal[choices[0].choices]
        several: Any = Annotated[list[name], Field(min_length=slices, max_length=slices)]
        fields[METHOD] = (several if space.genome.method_per_slice else name, ...)
    fields["genome"] = (Annotated[list[row], Field(min_length=slices, max_length=slices)], ...)
    strict = ConfigDict(extra="forbid")
    proposal = create_model("Proposal", __config__=strict, **fields)
    proposals: Any = Annotated[list[proposal], Field(min_length=1, max_length=question.wanted)]
    return create_model("Answer", __config__=strict, analysis=(str, Field(max_length=600)), proposals=(proposals, ...))


def read(text: str, question: Question) -> Reading:
    """Read an answer; repair what has one meaning only, drop the rest, and say so."""
    problems: list[str] = []
    answer = _last_object(text)
    if answer is None:
        return Reading(problems=["the answer holds no JSON object"])
    raw: Any = answer.get("proposals", answer)
    rows: list[tuple[Genes, str]] = []
    for place, proposal in enumerate(raw if isinstance(raw, list) else [raw]):
        genome: Any = proposal
        method: Any = None
        if isinstance(proposal, dict):
            method = next((proposal[key] for key in (METHOD, "merge_methods", "method") if key in proposal), None)
            # The last two names are those of the tools before this one, which models may have seen.
            genome = next((proposal[key] for key in ("genome", "weights", "mean_genome") if key in proposal), None)
        try:
            genes = _genes(genome, method, question.space, problems)
        except ValueError as error:
            problems.append(f"dropped proposal {place + 1}: {error}")
            continue
        rows.append((genes, writable(str(proposal.get("reason", ""))) if isinstance(proposal, dict) else ""))
    if not rows and not problems:
        problems.append("the answer holds no proposal")
    analysis = writable(str(answer.get("analysis", "")))[:600]
    return Reading(admit(question, rows, problems), analysis, problems)


def _genes(genome: Any, method: Any, space: SearchSpace, problems: list[str]) -> Genes:
    """A genome in any shape that has one meaning. Raises ValueError for the others."""
    if isinstance(genome, dict):
        genome = (
            [genome.get(label) for label in space.slices] if set(genome) == set(space.slices) else [*genome.values()]
        )
    numbers, choices = _numeric(space), _choices(space)
    values = [*_scalars(genome)]
    named: list[Any] = [*_scalars(method)] if method is not None else []
    if choices and not named and len(values) == len(space.genes):
        # The methods stand in the table, each before the numbers it is for.
        named = [value for value, gene in zip(values, space.genes, strict=True) if gene.choices]
        values = [value for value, gene in zip(values, space.genes, strict=True) if not gene.choices]
    if len(values) != len(numbers):
        raise ValueError(f"it has {len(values)} numbers, the genome {len(numbers)}")
    if len(named) == 1:
        named *= len(choices)  # one method named for all slices
    if len(named) != len(choices) and choices:
        raise ValueError(f"it names {len(named)} merge methods, {len(choices)} are wanted")
    chosen = {gene.name: choice_of(gene, value) for gene, value in zip(choices, named[: len(choices)], strict=True)}
    return {**chosen, **_weights([_number(value) for value in values], numbers, problems)}


def _weights(values: Sequence[float], genes: Sequence[Gene], problems: list[str]) -> Genes:
    fractions = any(value != int(value) for value in values)
    if fractions and all(g.low <= value <= g.high for value, g in zip(values, genes, strict=True)):
        problems.append("took decimals as weights, not as hundredths")
        return {gene.name: value for gene, value in zip(genes, values, strict=True)}
    return {gene.name: value / scale(gene) for gene, value in zip(genes, values, strict=True)}


def _scalars(value: Any) -> Iterator[Any]:
    """What stands in nested lists."""
    if isinstance(value, list):
        for entry in value:
            yield from _scalars(entry)
    elif isinstance(value, dict):
        yield from _scalars([*value.values()])
    else:
        yield value


def _number(value: Any) -> float:
    """A number, also a numeral in a string. Raises ValueError for anything else."""
    if isinstance(value, bool) or value is None:
        raise ValueError(f"{value!r} is not a number")
    try:
        number = float(value)  # raises ValueError for prose
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{str(value)[:20]} is not finite")
    return number


def _last_object(text: str) -> dict[str, Any] | None:
    """The last complete JSON object of a text: after thoughts, in a fence or bare."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    decoder = json.JSONDecoder()
    found, place = None, text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except RecursionError:  # nested thousands deep: noise, and so is what follows
            return found
        except ValueError:
            place = text.find("{", place + 1)
            continue
        if isinstance(value, dict):
            found = value
        place = text.find("{", end)
    return found
