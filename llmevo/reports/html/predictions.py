"""What was predicted of candidates before they were scored: by the LLM in its replies, by the statistics in notes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llmevo.reports.html.analysis import Subject
from llmevo.run.log import events
from llmevo.search.evidence import Evidence, calibration
from llmevo.search.optimizers.population import key
from llmevo.search.prompts.question import Question
from llmevo.search.prompts.reading import read
from llmevo.search.prompts.table import GeneTable

EXPECTED = re.compile(r"expected (-?\d[\d.e+-]*)")
"""The note of a candidate that the Gaussian process has ranked."""


LLM, STATISTICS = "the LLM", "the Gaussian process"


@dataclass(frozen=True)
class Prediction:
    """A predicted score and what came of it."""

    candidate: int
    by: str
    """`the LLM` or `the Gaussian process`."""
    predicted: float
    achieved: float


def predictions(subject: Subject) -> list[Prediction]:
    """All of them, in the order of the candidates; those of failures are left out. None where every task is an aim of
    its own: what was predicted is the score under one generation's emphasis.
    """
    if subject.state.aims.pareto:
        return []
    told = {**_noted(subject), **_replied(subject)}
    return [
        Prediction(trial.candidate.id, by, predicted, trial.score.total)
        for trial in subject.scored
        if trial.score and trial.candidate.id in told
        for by, predicted in [told[trial.candidate.id]]
    ]


def rank_correlation(found: list[Prediction], by: str) -> float | None:
    """Spearman's; None for fewer than three predictions."""
    return calibration([(p.predicted, p.achieved) for p in found if p.by == by])


def _noted(subject: Subject) -> dict[int, tuple[str, float]]:
    found: dict[int, tuple[str, float]] = {}
    for candidate in subject.state.candidates.values():
        if candidate.origin == "gaussian" and (said := EXPECTED.fullmatch(candidate.note)):
            found[candidate.id] = STATISTICS, float(said[1])
    return found


def _replied(subject: Subject) -> dict[int, tuple[str, float]]:
    """The replies are read again, as the search has read them; a proposal is known by its genes."""
    found: dict[int, tuple[str, float]] = {}
    inside = subject.question().inside
    for event in subject.state.prompted:
        if event.style != "chat" or not event.reply or not event.used:
            continue
        asked = {
            key(candidate.genes): candidate.id
            for candidate in subject.state.candidates.values()
            if candidate.generation == event.generation and candidate.origin == "llm"
        }
        before = [trial for trial in inside if trial.candidate.generation < event.generation]
        best = max(before, key=lambda trial: trial.rank, default=None)
        for genes, predicted in _proposals(subject.question([best] if best else []), event):
            if genes in asked:
                found[asked[genes]] = LLM, predicted
    return found


def _proposals(question: Question, event: events.Prompted) -> Iterator[tuple[tuple[float, ...], float]]:
    """Which slices of a large space a prompt was about is not in the log, so all that it may have been are tried."""
    space = question.space
    for sheet in dict.fromkeys(GeneTable.of(space, seed).slices for seed in range(len(space.slices))):
        for proposal in read(event.reply or "", question, GeneTable(space, sheet), Evidence((), ())).proposals:
            if proposal.predicted is not None:
                yield key(proposal.genes), proposal.predicted
