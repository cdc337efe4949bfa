"""For chat models: tables with names, answered in JSON.

Genes are shown as hundredths (weight 100 is the whole task vector): integers, because models continue and
compare integers far better than decimals (EvoLLM, https://arxiv.org/abs/2402.18381, section 3).
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from llmevo.genome import Gene, Genes, SearchSpace
from llmevo.prompting.question import Prompt, Question, Reading, Templates, admit, writable

FILES = ("chat_system.j2", "chat_user.j2")
SCALE = 100


def ask(question: Question, templates: Templates, seed: int) -> Prompt:
    """The prompt for a chat model."""
    columns = _columns(question.space)
    schema = answer_model(question).model_json_schema()
    variables: dict[str, Any] = {
        "q": question,
        "columns": columns,
        "rows": [(trial, _table(question.space, trial.candidate.genes)) for trial in question.elites],
        "low": {g.parameter: round(g.low * SCALE) for g in question.space.genes},
        "high": {g.parameter: round(g.high * SCALE) for g in question.space.genes},
        "schema": json.dumps(schema),
    }
    messages = (
        {"role": "system", "content": templates.render(FILES[0], **variables)},
        {"role": "user", "content": templates.render(FILES[1], **variables)},
    )
    return Prompt(messages, lambda text: read(text, question), schema=schema, generation=question.generation, seed=seed)


def _columns(space: SearchSpace) -> list[Gene]:
    """The genes of one slice: the columns of every table."""
    return [gene for gene in space.genes if gene.slice == space.slices[0]]


def _table(space: SearchSpace, genes: Genes) -> list[tuple[str, list[int]]]:
    """(slice, integers) for every slice."""
    return [(label, [round(genes[g.name] * SCALE) for g in space.genes if g.slice == label]) for label in space.slices]


def answer_model(question: Question) -> type[BaseModel]:
    """The pydantic model of the answer: every list of a fixed length, every integer bounded, nothing besides."""
    space = question.space
    low = min(round(gene.low * SCALE) for gene in space.genes)
    high = max(round(gene.high * SCALE) for gene in space.genes)
    columns, slices = len(_columns(space)), len(space.slices)
    integer: Any = Annotated[int, Field(ge=low, le=high)]
    row: Any = Annotated[list[integer], Field(min_length=columns, max_length=columns)]
    table: Any = Annotated[list[row], Field(min_length=slices, max_length=slices)]
    strict = ConfigDict(extra="forbid")
    proposal = create_model("Proposal", __config__=strict, reason=(str, Field(max_length=200)), genome=(table, ...))
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
        if isinstance(proposal, dict):
            # The last two names are those of the tools before this one, which models may have seen.
            genome = next((proposal[key] for key in ("genome", "weights", "mean_genome") if key in proposal), None)
        try:
            genes = _genes(genome, question.space, problems)
        except ValueError as error:
            problems.append(f"dropped proposal {place + 1}: {error}")
            continue
        rows.append((genes, writable(str(proposal.get("reason", ""))) if isinstance(proposal, dict) else ""))
    if not rows and not problems:
        problems.append("the answer holds no proposal")
    analysis = writable(str(answer.get("analysis", "")))[:600]
    return Reading(admit(question, rows, problems), analysis, problems)


def _genes(genome: Any, space: SearchSpace, problems: list[str]) -> Genes:
    """A genome in any shape that has one meaning. Raises ValueError for the others."""
    if isinstance(genome, dict):
        genome = (
            [genome.get(label) for label in space.slices] if set(genome) == set(space.slices) else [*genome.values()]
        )
    numbers = [*_numbers(genome)]
    if len(numbers) != len(space.genes):
        raise ValueError(f"it has {len(numbers)} numbers, the genome {len(space.genes)}")
    fractions = any(number != int(number) for number in numbers)
    if fractions and all(g.low <= number <= g.high for number, g in zip(numbers, space.genes, strict=True)):
        problems.append("took decimals as weights, not as hundredths")
        return {gene.name: number for gene, number in zip(space.genes, numbers, strict=True)}
    return {gene.name: number / SCALE for gene, number in zip(space.genes, numbers, strict=True)}


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in nested lists, numerals in strings included."""
    if isinstance(value, list):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, dict):
        yield from _numbers([*value.values()])
    elif isinstance(value, bool) or value is None:
        raise ValueError(f"{value!r} is not a number")
    else:
        try:
            number = float(value)  # raises ValueError for prose
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"{str(value)[:20]} is not finite")
        yield number


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
