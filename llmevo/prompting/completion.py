"""For base models: no instructions, a pattern to continue.

Lines of fixed-width integers, worst first, each behind its score; the last line has a score and no integers yet
(EvoLLM, https://arxiv.org/abs/2402.18381; LMX, https://arxiv.org/abs/2302.12170). Even a small model recombines
what it sees. The gene's range is shown as 00 to 99, the scores as their place between worst and best. Choices are
numbered, for every token is a digit; a line at the top says what the numbers name.
"""

import re
from collections.abc import Sequence
from statistics import median, mode

from llmevo.genes import Gene, Genes
from llmevo.prompting.question import Prompt, Question, Reading, Templates, admit, choice_of

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
    choices = next((gene.choices for gene in question.space.genes if gene.choices), ())
    text = templates.render(FILES[0], rows=rows, q=question, target=TOP, choices=choices)
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
    return [f"{_integer(gene, genes[gene.name]):02d}" for gene in question.space.genes]


def _integer(gene: Gene, value: float) -> int:
    return round(value if gene.choices else TOP * gene.to_unit(value))


def read(text: str, question: Question) -> Reading:
    """One continuation a line. The median of all comes first, then the continuations as they are."""
    problems: list[str] = []
    genes = question.space.genes
    rows: list[list[int]] = []
    for line in text.strip().splitlines():
        # Words are names of choices; without choices, nothing but integers counts.
        words: list[str] = re.findall(r"\d+|[A-Za-z_]\w*" if any(g.choices for g in genes) else r"\d+", line)
        numerals = sum(word.isdigit() for word in words)
        if len(words) != len(genes) or any(word.isdigit() and len(word) > len(str(TOP)) for word in words):
            problems.append(f"dropped a line of {numerals} integers; {len(genes)} from 0 to {TOP} are wanted")
            continue
        try:
            rows.append([_read(gene, word) for gene, word in zip(genes, words, strict=True)])
        except ValueError as error:
            problems.append(f"dropped a line: {error}")
    if not rows:
        return Reading(problems=problems or ["the answer is empty"])
    columns = zip(genes, zip(*rows, strict=True), strict=True)
    middle = [mode(column) if gene.choices else round(median(column)) for gene, column in columns]
    notes = [f"median of {len(rows)} continuations", *(f"continuation {place + 1}" for place in range(len(rows)))]
    points = [(_genes(genes, numbers), note) for numbers, note in zip([middle, *rows], notes, strict=True)]
    return Reading(admit(question, points, problems), "", problems)


def _read(gene: Gene, word: str) -> int:
    """The integer that a word is or stands for. Raises ValueError for any other word."""
    if gene.choices:
        return int(choice_of(gene, word))
    if not word.isdigit():
        raise ValueError(f"{word[:20]!r} is not a number")
    return int(word)


def _genes(genes: Sequence[Gene], numbers: Sequence[int]) -> Genes:
    return {
        gene.name: float(number) if gene.choices else gene.low + number / TOP * (gene.high - gene.low)
        for gene, number in zip(genes, numbers, strict=True)
    }
