"""The scores that the LLM and the surrogate predicted of candidates, and the scores that these achieved."""

from collections.abc import Iterator
from dataclasses import dataclass

from llmevo.reports.html.analysis import Subject
from llmevo.run.log import events
from llmevo.search.evidence import Evidence, calibration
from llmevo.search.optimizers.base import genes_key
from llmevo.search.prompts.question import Question
from llmevo.search.prompts.reading import read
from llmevo.search.prompts.table import GeneTable

LLM, STATISTICS = "the LLM", "the Gaussian process"


@dataclass(frozen=True)
class Prediction:
    """A predicted score and the achieved one."""

    candidate: int
    by: str
    """`the LLM` or `the Gaussian process`."""
    predicted: float
    achieved: float


def predictions(subject: Subject) -> list[Prediction]:
    """All of them, in the order of the candidates; those of failures are left out. None where every task is an
    objective of its own: what was predicted is the score under one generation's emphasis.
    """
    if subject.state.objective.pareto:
        return []
    told = {**_logged(subject), **_replied(subject)}
    return [
        Prediction(trial.candidate.id, by, predicted, trial.score.total)
        for trial in subject.scored
        if trial.score and trial.candidate.id in told
        for by, predicted in [told[trial.candidate.id]]
    ]


def rank_correlation(found: list[Prediction], by: str) -> float | None:
    """Spearman's; None for fewer than three predictions."""
    return calibration([(p.predicted, p.achieved) for p in found if p.by == by])


def _logged(subject: Subject) -> dict[int, tuple[str, float]]:
    return {
        candidate.id: (LLM if candidate.origin == "llm" else STATISTICS, candidate.expected)
        for candidate in subject.state.candidates.values()
        if candidate.expected is not None
    }


def _replied(subject: Subject) -> dict[int, tuple[str, float]]:
    """Return the LLM's predictions in older logs, which have them in the replies alone: these are read again, as the
    search has read them, and a proposal is known by its genes.
    """
    found: dict[int, tuple[str, float]] = {}
    inside = subject.question().inside
    for event in subject.state.prompted:
        if event.style != "chat" or not event.reply or not event.used:
            continue
        asked = {
            genes_key(candidate.genes): candidate.id
            for candidate in subject.state.candidates.values()
            if not candidate.path
            and candidate.generation == event.generation
            and candidate.origin == "llm"
            and candidate.expected is None
        }
        if not asked:
            continue
        before = [trial for trial in inside if trial.candidate.generation < event.generation]
        best = max(before, key=lambda trial: trial.rank, default=None)
        for genes, predicted in _proposals(subject.question([best] if best else []), event):
            if genes in asked:
                found[asked[genes]] = LLM, predicted
    return found


def _proposals(question: Question, event: events.Prompted) -> Iterator[tuple[tuple[float, ...], float]]:
    """Read a reply for every table that its prompt may have shown: the log lacks the slices of a large space."""
    space = question.space
    for sheet in dict.fromkeys(GeneTable.of(space, seed).slices for seed in range(len(space.slices))):
        for proposal in read(event.reply or "", question, GeneTable(space, sheet), Evidence((), ())).proposals:
            if proposal.expected is not None:
                yield genes_key(proposal.genes), proposal.expected
