"""Before the spend: the search space, the first prompt, and what the run will take. Reads a few weights, loads none."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from llmevo.bench import Bench
from llmevo.loop import population, start_rows
from llmevo.merging import Merger
from llmevo.progress import clock
from llmevo.prompting import Prompt
from llmevo.trial import Candidate, Score, Suggestion, Trial

EFFICIENCY = 0.35
"""The share of a large matrix product's speed that scoring reaches (measured on a 135M model, bf16, 2 CPU cores)."""


@dataclass(frozen=True)
class Forecast:
    """What a run will take, roughly."""

    generations: int
    items: int
    """Questions a candidate answers."""
    tokens: int
    """Tokens a candidate reads."""
    seconds: float
    """Of the whole run, held-out scoring included."""
    prompt_tokens: int
    completion_tokens: int
    cost: float


GENERATIONS = 8
"""How many are looked through for the first prompt: not every optimizer asks in every one."""


def first_prompt(bench: Bench) -> Prompt | None:
    """The first prompt as it will be, but for the scores, which are 0 here; None for an optimizer without an LLM."""
    if not bench.asks:
        return None
    zeros = {name: {metric: 0.0} for name, (_, metric) in bench.config.counted.items()}
    optimizer = bench.optimizer()
    candidates = [Candidate(i, 0, s.origin, s.genes, s.note) for i, s in enumerate(start_rows(bench))]
    # As in the run, parents that are no points of the space are not told.
    told = [candidate for candidate in candidates if bench.space.contains(candidate.genes)]
    count = len(candidates)
    for generation in range(1, GENERATIONS + 1):
        optimizer.tell([Trial(candidate, Score(0.0, 0.0, zeros, 0)) for candidate in told])
        asking = optimizer.ask(min(bench.evaluations - count, population(bench)) or 2)
        try:
            return next(asking)
        except StopIteration as done:
            suggested: list[Suggestion] = done.value
        finally:
            asking.close()
        told = [Candidate(count + i, generation, s.origin, s.genes, s.note) for i, s in enumerate(suggested)]
        count += len(told)
    return None


def forecast(bench: Bench, prompt: Prompt | None) -> Forecast:
    """From the texts' lengths, the models' size and the speed of this machine's matrix products."""
    config = bench.config
    tokenizer: Any = AutoTokenizer.from_pretrained(bench.sources.folder(config.genome.references[0]))

    def tokens(evaluator: Any) -> int:
        return sum(len(tokenizer.encode(text)) for text in evaluator.read()) if evaluator else 0

    shapes = bench.sources[config.genome.references[0]].shapes
    parameters = sum(math.prod(shape) for name, shape in shapes.items() if "embed" not in name)
    searched, held_out = tokens(bench.evaluator), tokens(bench.heldout)
    rows = bench.start_rows + 2 if bench.heldout else 0
    read = bench.evaluations * searched + rows * held_out
    generations = max(0, math.ceil((bench.evaluations - bench.start_rows) / population(bench)))
    asked = sum(len(tokenizer.encode(message["content"])) for message in prompt.messages) if prompt else 0
    answered = prompt.integers * prompt.digits * prompt.samples if prompt and prompt.integers else 400
    spent = generations * asked * 2, generations * answered if prompt else 0
    price = config.llm.price
    return Forecast(
        generations=generations,
        items=bench.evaluator.items,
        tokens=searched,
        seconds=read * 2 * parameters / (_speed() * EFFICIENCY),
        prompt_tokens=spent[0],
        completion_tokens=spent[1],
        cost=(spent[0] * price.prompt + spent[1] * price.completion) / 1e6,
    )


def _speed() -> float:
    """Floating-point operations a second of a bf16 matrix product here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(1024, 1024, dtype=torch.bfloat16, device=device)
    float((a @ a)[0, 0])
    started, rounds = time.monotonic(), 20
    for _ in range(rounds):
        a = a @ a * 1e-3
    float(a[0, 0])
    return rounds * 2 * 1024**3 / (time.monotonic() - started)


def geometry(bench: Bench) -> Table:
    """The task vectors of each slice: how large, and the two that are most alike."""
    facts = bench.rig.geometry
    models = [*facts[0].norms]
    origin = "the base" if bench.config.genome.base_model else "the models' mean"
    table = Table(title=f"\nSize of the task vectors, against {origin}", title_justify="left", box=None)
    for column in ("slice", *models, "most alike", "cosine"):
        table.add_column(column, justify="left" if column in ("slice", "most alike") else "right")
    for of in facts:
        pair, cosine = max(of.cosines.items(), key=lambda entry: entry[1], default=("", None))
        sizes = [f"{of.norms[model]:.2%}" for model in models]
        table.add_row(of.slice, *sizes, pair, "" if cosine is None else f"{cosine:.2f}")
    return table


def inspect(bench: Bench, console: Console) -> None:
    """Print all of it."""
    space = bench.space
    table = Table(title=f"{len(space.genes)} genes over {bench.layers} layers", title_justify="left", box=None)
    for column in ("gene", "low", "high", "uniform"):
        table.add_column(column, justify="left" if column == "gene" else "right")
    uniform = space.uniform()
    for gene in space.genes:
        if gene.choices:
            table.add_row(gene.name, ", ".join(gene.choices), "", gene.shown(uniform[gene.name]))
            continue
        table.add_row(gene.name, f"{gene.low:g}", f"{gene.high:g}", gene.shown(uniform[gene.name]))
    console.print(table)
    console.print(geometry(bench))
    lost = Merger(bench.sources).rounding_loss(space.decode(uniform))
    console.print(
        f"\nRounding to {bench.config.genome.dtype} loses {lost:.0%} of what the uniform merge changes."
        + (" Most of what the genes tune is rounding noise: set genome.dtype: float32." if lost > 0.5 else ""),
        style="yellow" if lost > 0.5 else None,
        highlight=False,
    )
    prompt = first_prompt(bench)
    if prompt:
        console.print(f"\nFirst prompt, for {bench.proposer_name} {bench.proposer.model} (scores are not known yet: 0)")
        for message in prompt.messages:
            console.print(f"[{message['role']}]", markup=False, style="bold")
            console.print(message["content"], markup=False, highlight=False, soft_wrap=True)
    ahead = forecast(bench, prompt)
    console.print(
        f"\nForecast: {bench.evaluations} evaluations of {ahead.items} questions ({ahead.tokens:,} tokens) each,"
        f" {bench.start_rows} of them start rows, then {ahead.generations} generations of {population(bench)};"
        f" about {clock(ahead.seconds)} on this machine.",
        highlight=False,
    )
    if prompt:
        console.print(
            f"The LLM reads about {ahead.prompt_tokens:,} tokens and writes about {ahead.completion_tokens:,};"
            f" cost {ahead.cost:.2f} at the config's prices.",
            highlight=False,
        )
