"""Recipes, failures and models as lines of the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmevo.genes import Genes
from llmevo.prompting.budget import Detail
from llmevo.prompting.evidence import contrasts
from llmevo.prompting.names import Names
from llmevo.prompting.question import Question
from llmevo.prompting.sheet import Sheet
from llmevo.trial import Trial

SAID = ("parent", "uniform", "coefficient", "user", "llm")
"""Origins that are worth telling; all others are the numeric optimizer's."""


REASON = 160
"""Characters of which constraints are violated, at most."""


@dataclass(frozen=True)
class Row:
    """A recipe as it is shown."""

    name: str
    table: str
    """`[31 50] [62 90]`: a list for every slice."""
    methods: str
    score: float | None = None
    stderr: float = 0.0
    tasks: str = ""
    """The score of every shown task, in their order."""
    reason: str = ""
    """Why it failed, or which constraints it violates."""


@dataclass(frozen=True)
class Known:
    """What is known of one model."""

    name: str
    score: float
    tasks: str
    best: str
    """The tasks at which it is the best of all models."""


def shown_trials(question: Question, detail: Detail) -> list[Trial]:
    """The best, and some that are near to the best and bad; worst first."""
    near = contrasts(question, detail.contrasts) if len(question.inside) > detail.rows else []
    taken = {trial.candidate.id for trial in near}
    ranked = sorted((t for t in question.inside if t.candidate.id not in taken), key=lambda trial: trial.value)
    return sorted([*near, *ranked[len(near) - detail.rows :]], key=lambda trial: trial.value)


def failed_trials(question: Question, detail: Detail) -> list[Trial]:
    """The latest failure of each reason; the latest last."""
    latest = {trial.reason: trial for trial in question.trials if not trial.score}
    return sorted(latest.values(), key=lambda trial: trial.candidate.id)[-detail.failures :]


def trial_row(
    trial: Trial, question: Question, sheet: Sheet, names: Names, tasks: Sequence[str], detail: Detail | None = None
) -> Row:
    """A trial; with `detail` one that has failed, and why."""
    inside = question.space.contains(trial.candidate.genes)
    row = plain_row("", trial.candidate.genes, sheet, names) if inside else Row("", "", "")
    origin = trial.candidate.origin
    return Row(
        f"#{trial.candidate.id}" + (f" {origin}" if origin in SAID else ""),
        row.table,
        row.methods,
        trial.score.total if trial.score else None,
        trial.score.stderr if trial.score else 0.0,
        _scores(trial, question, tasks),
        names.text(trial.reason, detail.reason if detail else REASON),
    )


def plain_row(
    name: str, genes: Genes, sheet: Sheet, names: Names, score: float | None = None, stderr: float = 0.0
) -> Row:
    table = " ".join(f"[{' '.join(map(str, integers))}]" for integers in sheet.rows(genes))
    return Row(name, table, " ".join(names.methods[method] for method in sheet.methods(genes)), score, stderr)


def _scores(trial: Trial, question: Question, tasks: Sequence[str]) -> str:
    values = [_metric(trial, question, task) for task in tasks]
    hundredths = all(0 <= value <= 1 for value in values if value is not None)
    return " ".join(
        "?" if value is None else f"{100 * value:.0f}" if hundredths else f"{value:.3g}" for value in values
    )


def _metric(trial: Trial, question: Question, task: str) -> float | None:
    """The metric of a task that counts; None where a score lacks it."""
    return trial.score.tasks.get(task, {}).get(question.tasks[task][1]) if trial.score else None


def model_rows(question: Question, names: Names, tasks: Sequence[str], detail: Detail) -> list[Known]:
    """Each parent's score alone, and what it is best at."""
    parents = [trial for trial in question.parents if trial.candidate.note in names.models]
    scores = {task: [(_metric(t, question, task), t.candidate.note) for t in parents] for task in tasks}
    best: dict[str, list[str]] = {}
    for task, found in scores.items():
        known = [(value, name) for value, name in found if value is not None]
        if len({value for value, _ in known}) > 1:
            # Where lower is better a task has a negative weight.
            most = max(known, key=lambda entry: entry[0] * question.tasks[task][0])
            best.setdefault(most[1], []).append(names.tasks[task])
    kept = sorted(parents, key=lambda trial: -trial.value)[: detail.models]
    return [
        Known(
            names.models[trial.candidate.note],
            trial.score.total if trial.score else trial.value,
            _scores(trial, question, tasks),
            _listed(best.get(trial.candidate.note, []), tasks),
        )
        for trial in parents
        if trial in kept
    ]


def _listed(best: Sequence[str], tasks: Sequence[str]) -> str:
    return "all of them" if len(best) == len(tasks) > 2 else ", ".join(best)
