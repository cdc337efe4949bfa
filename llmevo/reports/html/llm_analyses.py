"""The LLM's analyses, and its hypotheses with what the scores say of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmevo.reports.html.analysis import Subject
from llmevo.run.log import events
from llmevo.search.evidence import Evidence, Gap, verdict
from llmevo.search.prompts.question import Hypothesis
from llmevo.search.prompts.reading import read
from llmevo.search.prompts.table import GeneTable

MOST = 12
"""Answers that are shown, the latest: each is read again."""


@dataclass(frozen=True)
class Claim:
    """One hypothesis: a recipe that should score higher than another."""

    text: str
    task: str
    """The short name of the task whose score decides; empty for the total."""
    word: str
    """`supported`, `refuted` or `open`, by the scores so far."""
    better: int | None
    worse: int | None
    """The candidates with these recipes; None if one was not scored."""
    effect: Gap | None
    """The lead of the first; None unless both were scored."""


@dataclass(frozen=True)
class Analysis:
    """One answer of the LLM."""

    generation: int
    model: str
    analysis: str
    claims: Sequence[Claim]


def analyses(subject: Subject) -> list[Analysis]:
    """Return the latest analyses with their hypotheses, the latest first. A base model that continues numbers has
    neither.
    """
    said = [event for event in subject.state.prompted if event.reply and event.style == "chat"]
    found = [
        Analysis(event.generation, event.model, event.analysis, _claims(subject, event)) for event in said[-MOST:][::-1]
    ]
    return [thought for thought in found if thought.analysis or thought.claims]


def _claims(subject: Subject, event: events.Prompted) -> list[Claim]:
    now = subject.question()
    claims: list[Claim] = []
    for hypothesis in _hypotheses(subject, event):
        found = verdict(now, hypothesis)
        better, worse = (trial.candidate.id if trial else None for trial in (found.better, found.worse))
        task = subject.tasks.get(hypothesis.task, hypothesis.task) if hypothesis.task else ""
        claims.append(Claim(hypothesis.text, task, found.word, better, worse, found.effect))
    return claims


def _hypotheses(subject: Subject, event: events.Prompted) -> list[Hypothesis]:
    """Read the answer as the search has read it: with the trials before it, for every table that it may be about."""
    if "hypotheses" not in (event.reply or ""):
        return []
    before = [t for t in subject.state.trials.values() if t.candidate.generation < event.generation]
    question, space = subject.question(before), subject.space
    sheets = dict.fromkeys(GeneTable.of(space, seed).slices for seed in range(len(space.slices)))
    readings = [read(event.reply or "", question, GeneTable(space, sheet), Evidence((), ())) for sheet in sheets]
    return max((reading.hypotheses for reading in readings), key=len, default=[])
