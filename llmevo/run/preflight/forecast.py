"""What a run will take: from the texts and this machine's speed, or from one candidate that is really scored."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from llmevo.evaluation.score import Score
from llmevo.models.tokenizer import load_tokenizer
from llmevo.run.experiment import Experiment, population
from llmevo.run.preflight.base import Finding
from llmevo.run.progress import heldout_rows, votes_at_most
from llmevo.search.objectives.scalarize import random_weights
from llmevo.search.prompts.question import Prompt
from llmevo.search.trial import Candidate, Suggestion, Trial

EFFICIENCY = 0.35
"""The share of a large matrix product's speed that scoring reaches (measured on a 135M model, bf16, 2 CPU cores)."""


ANSWER = 400
"""Tokens of an answer that is not held to digits."""


@dataclass(frozen=True)
class Measured:
    """One candidate, merged and scored: what the engine really takes."""

    merge: float
    """Seconds."""
    evaluate: float
    """Seconds, for the search questions."""
    items: int

    @property
    def items_per_second(self) -> float:
        return self.items / self.evaluate if self.evaluate else 0.0


@dataclass(frozen=True)
class Forecast:
    """What a run will take, roughly."""

    evaluations: int
    start_rows: int
    generations: int
    population: int
    items: int
    """Questions a candidate answers."""
    all_items: int
    """Questions of the whole run, held-out scoring included."""
    tokens: int
    """Tokens a candidate reads."""
    seconds: float
    """Of the whole run, held-out scoring included, but not the LLM's answers."""
    prompts: int
    """At most: from the first one on the LLM may be asked in every generation."""
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    """Of the prompts; None where a server is asked and `llm.price` does not say what that costs."""
    inquiries: int
    """What LLM judges are asked in the whole run, at most; not in the cost."""
    votes: int
    """What a person is asked in the whole run, at most; the time for it is not in the seconds."""
    measured: Measured | None
    """What the time follows from; None where it is an estimate."""


def measure(experiment: Experiment) -> Measured:
    """Start the engine, merge the uniform candidate and score it. Raises CandidateError where that fails."""
    recipe = experiment.space.decode(experiment.space.uniform())
    score, seconds = experiment.scorer.score(recipe)
    return Measured(seconds["merge"], seconds["evaluate"], score.items)


@dataclass(frozen=True)
class First:
    """The first prompt of a run."""

    prompt: Prompt
    generation: int
    """When it is asked; generation 0 are the start rows."""


def forecast(experiment: Experiment, first: First | None, measured: Measured | None = None) -> Forecast:
    """From the texts' lengths, the models' size and the speed of this machine's matrix products; or as measured.

    `first` is the first prompt, None where none is asked.
    """
    config, budget = experiment.config, experiment.config.search.budget
    donor = experiment.space.decode(experiment.space.uniform()).tokenizer_donor
    tokenizer = load_tokenizer(experiment.sources.folder(donor))

    def tokens(evaluator: Any) -> int:
        return sum(len(tokenizer.encode(text)) for text in evaluator.model_inputs()) if evaluator else 0

    items, searched, held_out = experiment.evaluator.items, tokens(experiment.evaluator), tokens(experiment.heldout)
    heldout_items = experiment.heldout.items if experiment.heldout else 0
    if measured:
        each = measured.merge + measured.evaluate
        last = measured.merge + measured.evaluate * heldout_items / items
    else:
        shapes = experiment.sources[config.genome.references[0]].shapes
        parameters = sum(math.prod(shape) for name, shape in shapes.items() if "embed" not in name)
        each, last = (read * 2 * parameters / (_speed() * EFFICIENCY) for read in (searched, held_out))
    evaluations, size = experiment.evaluations, population(experiment)
    if budget.minutes is not None:
        evaluations = max(len(experiment.start_rows), min(evaluations, int(budget.minutes * 60 / each)))
    origins = [row.origin for row in experiment.start_rows]
    rows = heldout_rows(origins) if experiment.heldout else 0
    generations = max(0, math.ceil((evaluations - len(experiment.start_rows)) / size))
    prompt, price = first.prompt if first else None, config.llm.price
    asked = sum(len(tokenizer.encode(message["content"])) for message in prompt.messages) if prompt else 0
    answered = prompt.integers * prompt.digits * prompt.samples if prompt and prompt.integers else ANSWER
    prompts = max(0, generations - first.generation + 1) if first else 0
    spent = prompts * asked * 2, prompts * answered  # prompts grow with what there is to tell
    return Forecast(
        evaluations=evaluations,
        start_rows=len(experiment.start_rows),
        generations=generations,
        population=size,
        items=items,
        all_items=evaluations * items + rows * heldout_items,
        tokens=searched,
        seconds=evaluations * each + rows * last,
        prompts=prompts,
        prompt_tokens=spent[0],
        completion_tokens=spent[1],
        cost=(spent[0] * price.prompt + spent[1] * price.completion) / 1e6
        if price.prompt or price.completion or not prompts or experiment.proposer_name != "openai"
        else None,
        inquiries=evaluations * experiment.evaluator.inquiries
        + rows * (experiment.heldout.inquiries if experiment.heldout else 0),
        votes=votes_at_most(config, evaluations, origins, experiment.scorer.selection is not None),
        measured=measured,
    )


def first_prompt(experiment: Experiment) -> First | None:
    """The first prompt as it will be, but for the scores, which are 0 here; None for an optimizer without an LLM, and
    where the budget ends before the LLM is asked: not every optimizer asks in every generation.
    """
    if not experiment.asks:
        return None
    zeros = {name: {metric: 0.0} for name, (_, metric) in experiment.config.counted.items()}
    optimizer = experiment.optimizer()
    candidates = [Candidate(i, 0, s.origin, s.genes, s.note) for i, s in enumerate(experiment.start_rows)]
    # As in the run, parents that are no points of the space are not told.
    told = [candidate for candidate in candidates if experiment.space.contains(candidate.genes)]
    count, known = len(candidates), list[Trial]()
    generation = 0
    while count < experiment.evaluations:
        generation += 1
        trials = [Trial(candidate, Score(0.0, 0.0, zeros, 0)) for candidate in told]
        optimizer.tell(trials)
        known += trials
        if experiment.config.aims.pareto:
            optimizer.retell(known, random_weights(experiment.config.aims, generation))
        asking = optimizer.ask(min(experiment.evaluations - count, population(experiment)))
        try:
            return First(next(asking), generation)
        except StopIteration as done:
            suggested: list[Suggestion] = done.value
        finally:
            asking.close()
        told = [Candidate(count + i, generation, s.origin, s.genes, s.note) for i, s in enumerate(suggested)]
        count += len(told)
    return None


def unasked(experiment: Experiment, first: First | None) -> list[Finding]:
    """What is to be said where the LLM is never asked; `first` is the first prompt."""
    if first or not experiment.asks:
        return []
    begun = len(experiment.start_rows)
    rest = max(0, experiment.evaluations - begun)
    share = ", fewer than make one for the LLM" if rest else ""
    instead = ", or take `optimizer: llm-off`, the same search without an LLM"
    return [
        Finding(
            "search.budget",
            f"the LLM will not be asked: {begun} of the {experiment.evaluations} evaluations are start"
            f" rows, which leaves {rest}{share}",
            f"Raise the budget{instead if experiment.config.search.optimizer == 'llm' else ''}",
        )
    ]


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
