"""The prompt for base models: a pattern to continue, without instructions.

Each line is a score and fixed-width integers, worst first; the last line has a score and no integers yet (EvoLLM,
https://arxiv.org/abs/2402.18381; LMX, https://arxiv.org/abs/2302.12170). A gene's range is 00 to 99, and scores are
ranks: the best so far is 99, and the last line has 99 too, since a number beyond the known ones invites nonsense.
Choices are numbered, with their names in a line at the top, so that every token is a digit.

Small models fail at long lines. Where there are many genes, each prompt asks for a block of neighbours, and the others
stay as in the best recipe, as in EvoLLM.
"""

import math
import re
from collections.abc import Sequence
from statistics import median, mode

from llmevo.llm.json import LONGEST
from llmevo.llm.templates import Templates
from llmevo.search.prompts.question import Prompt, Question, Reading
from llmevo.search.prompts.reading import admit, choice_of
from llmevo.search.space import Gene, Genes
from llmevo.search.trial import Suggestion

FILES = ("completion.j2",)
TOP = 99  # the integer of a gene at its upper bound
SAMPLES = 5  # continuations drawn; their median is the first proposal
MOST = 16  # genes of a line at most
BLOCK = 8  # genes of a line where there are more than `MOST`
LINES = 50  # lines of an answer that are read


def ask(question: Question, templates: Templates, seed: int) -> Prompt:
    """Return the prompt for a base model."""
    genes = block(question.space.genes, seed)
    elites = question.elites
    values = sorted({trial.value for trial in elites})
    if len(values) == 1 and not question.before_rules_4:
        values = [-math.inf, *values]  # the best one is at the top, also where all are equal
    span, ranks = max(1, len(values) - 1), {value: place for place, value in enumerate(values)}
    rows = [
        (
            round(TOP * ranks[trial.value] / span),
            [f"{_integer(gene, trial.candidate.genes[gene.name]):02d}" for gene in genes],
        )
        for trial in elites
    ]
    choices = next((gene.choices for gene in genes if gene.choices), ())
    if question.mask_names:
        choices = tuple(f"method {place}" for place in range(1, len(choices) + 1))
    text = templates.render(FILES[0], rows=rows, q=question, target=TOP, choices=choices)
    return Prompt(
        ({"role": "user", "content": text},),
        read=lambda text: read(text, question, genes),
        integers=len(genes),
        digits=2,
        samples=SAMPLES,
        generation=question.generation,
        seed=seed,
        question=question,
    )


def block(genes: Sequence[Gene], seed: int) -> Sequence[Gene]:
    """Return all genes, or, of many, the block that the seed selects; the last block may be shorter."""
    if len(genes) <= MOST:
        return genes
    start = seed % -(-len(genes) // BLOCK) * BLOCK
    return genes[start : start + BLOCK]


def _integer(gene: Gene, value: float) -> int:
    return round(value if gene.choices else TOP * gene.to_unit(value))


def read(text: str, question: Question, genes: Sequence[Gene] | None = None) -> Reading:
    """Read one continuation a line. The median of all is the first proposal, then come the continuations.

    `genes` are those of the prompt, all by default.
    """
    problems: list[str] = []
    genes = question.space.genes if genes is None else genes
    rows: list[list[int]] = []
    for line in text[:LONGEST].strip().splitlines()[:LINES]:
        # Words may be names of choices.
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
    best = question.incumbent
    points = [
        Suggestion({**best, **_genes(genes, numbers)}, "llm", note)
        for numbers, note in zip([middle, *rows], notes, strict=True)
    ]
    return Reading(admit(question, points, problems), "", problems)


def _read(gene: Gene, word: str) -> int:
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
