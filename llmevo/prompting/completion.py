"""For base models: no instructions, a pattern to continue.

Lines of fixed-width integers, worst first, each behind its score; the last line has a score and no integers yet
(EvoLLM, https://arxiv.org/abs/2402.18381; LMX, https://arxiv.org/abs/2302.12170). Even a small model recombines
what it sees. The gene's range is shown as 00 to 99, the scores as their place between worst and best.
"""

import re
from statistics import median

from llmevo.genome import Genes
from llmevo.prompting.question import Prompt, Question, Reading, Templates, admit

FILES = ("completion.j2",)
TOP = 99
"""The highest two-digit integer: what a gene at its upper bound is shown as."""

SAMPLES = 5
"""Continuations drawn; their median is the first proposal."""


def ask(question: Question, templates: Templates, seed: int) -> Prompt:
    """The prompt for a base model."""
    elites = question.elites
    values = [trial.value for trial in elites] or [0.0]
    span = (max(values) - min(values)) or 1.0
    rows = [
        (round(TOP * (trial.value - min(values)) / span), _integers(question, trial.candidate.genes))
        for trial in elites
    ]
    text = templates.render(FILES[0], rows=rows, q=question, target=TOP)
    messages = ({"role": "user", "content": text},)
    size = len(question.space.genes)
    return Prompt(
        messages,
        lambda text: read(text, question),
        integers=size,
        digits=2,
        samples=SAMPLES,
        generation=question.generation,
        seed=seed,
    )


def _integers(question: Question, genes: Genes) -> list[str]:
    return [f"{round(TOP * x):02d}" for x in question.space.to_unit(genes)]


def read(text: str, question: Question) -> Reading:
    """One continuation a line. The median of all comes first, then the continuations as they are."""
    problems: list[str] = []
    size = len(question.space.genes)
    rows: list[list[int]] = []
    for line in text.strip().splitlines():
        numbers: list[str] = re.findall(r"\d+", line)
        if len(numbers) == size and all(len(number) <= len(str(TOP)) for number in numbers):
            rows.append([*map(int, numbers)])
        else:
            problems.append(f"dropped a line of {len(numbers)} integers; {size} from 0 to {TOP} are wanted")
    if not rows:
        return Reading(problems=problems or ["the answer is empty"])
    middle = [round(median(column)) for column in zip(*rows, strict=True)]
    notes = [f"median of {len(rows)} continuations", *(f"continuation {place + 1}" for place in range(len(rows)))]
    points = [(_genes(question, numbers), note) for numbers, note in zip([middle, *rows], notes, strict=True)]
    return Reading(admit(question, points, problems), "", problems)


def _genes(question: Question, numbers: list[int]) -> Genes:
    genes = question.space.genes
    return {g.name: g.low + n / TOP * (g.high - g.low) for g, n in zip(genes, numbers, strict=True)}
