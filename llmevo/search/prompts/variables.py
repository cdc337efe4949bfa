"""Recipes, failures and models as lines of the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from llmevo.search.evidence import Effect, Evidence, calibration, contrasts, target
from llmevo.search.prompts.detail import Detail
from llmevo.search.prompts.names import Names
from llmevo.search.prompts.question import Question
from llmevo.search.prompts.table import GeneTable, scale
from llmevo.search.space import Gene, Genes
from llmevo.search.trial import Trial


def geometry_lines(question: Question, sheet: GeneTable, names: Names, detail: Detail) -> list[tuple[str, str, str]]:
    """(slice, norms in ten-thousandths of the base's, cosines in hundredths): of all pairs, or of the most alike."""
    slices = [facts for facts in question.geometry if facts.slice in sheet.slices]
    each = detail.cosines // max(1, len(slices))
    if not each:
        return []
    shown: list[tuple[str, str, str]] = []
    for facts in slices:
        pairs = sorted(facts.cosines.items(), key=lambda pair: -abs(pair[1]))[:each]
        alike = [(*pair.split("/", 1), cosine) for pair, cosine in facts.cosines.items() if (pair, cosine) in pairs]
        norms = [*facts.norms.items()][: detail.models]
        shown.append(
            (
                names.slices[facts.slice],
                ", ".join(f"{names.models[model]} {round(10_000 * norm)}" for model, norm in norms),
                ", ".join(f"{names.models[a]}/{names.models[b]} {round(100 * cosine)}" for a, b, cosine in alike),
            )
        )
    return shown


def effect_lines(
    question: Question, sheet: GeneTable, evidence: Evidence, names: Names, filters: bool, detail: Detail
) -> list[tuple[str, list[str]]]:
    """(slice, lines): of all genes, or of those with the strongest effects."""
    known = [effect for effect in evidence.effects if effect.gene in sheet.numbers]
    kept = sorted(known, key=lambda effect: -abs(effect.strength))[: detail.effects]
    groups: list[tuple[str, list[str]]] = []
    for label in sheet.slices:
        lines = [_effect(e, question.incumbent, names, filters) for e in known if e in kept and e.gene.slice == label]
        if lines:
            groups.append((names.slices[label], lines))
    return groups


def _effect(effect: Effect, best: Genes, names: Names, filters: bool) -> str:
    """`model.parameter 43 (0-120) +12±5 +20`: best value, values tried, effect, best quarter minus the rest."""
    gene = effect.gene
    times = scale(gene)
    span = (gene.high - gene.low) * times
    # The effect of ten steps, in hundredths of a standard deviation of the scores.
    slope, error = (round(100 * value * 10 / span) for value in (effect.slope, effect.stderr))
    low, high, value = (round(v * times) for v in (effect.lowest, effect.highest, best[gene.name]))
    return (
        f"{names.column(gene, filters)} {value} ({low} to {high}) {slope:+d}±{error} {round(effect.contrast * span):+d}"
    )


def where(gene: Gene, sheet: GeneTable, names: Names, filters: bool) -> str:
    """A gene with its slice."""
    column = names.column(gene, filters)
    return column if len(sheet.slices) == 1 else f"{column} in {names.slices[gene.slice or 'all']}"


def method_lines(question: Question, sheet: GeneTable, names: Names) -> list[tuple[str, str]]:
    """For every choice of a merge method: (where, how each method has done)."""
    found: list[tuple[str, str]] = []
    for gene in sheet.choices:
        parts: list[str] = []
        for place, method in enumerate(gene.choices):
            values = [t.value for t in question.inside if gene.clamp(t.candidate.genes[gene.name]) == place]
            if values:
                parts.append(
                    f"{names.methods[method]} best {max(values):.3f} mean {fmean(values):.3f} of {len(values)}"
                )
        if parts:
            found.append((names.slices[gene.slice] if gene.slice else "all", "; ".join(parts)))
    return found


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
    trial: Trial, question: Question, sheet: GeneTable, names: Names, tasks: Sequence[str], detail: Detail | None = None
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
    name: str, genes: Genes, sheet: GeneTable, names: Names, score: float | None = None, stderr: float = 0.0
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


LAST = 6
"""Earlier predictions that are listed."""


def variables(question: Question, sheet: GeneTable, evidence: Evidence, detail: Detail) -> dict[str, Any]:
    """Everything by name."""
    space = question.space
    names = Names(space, question.tasks, question.mask_names, detail.names)
    tasks = sorted(question.tasks, key=lambda task: -abs(question.tasks[task][0]))[: detail.tasks]
    tasks = [task for task in question.tasks if task in tasks]  # in the order of the config
    filters = len(space.filters) > 1
    best = max(question.inside, key=lambda trial: trial.value, default=None)
    by_parameter = {gene.parameter: gene for gene in sheet.numbers}
    return {
        "q": question,
        "masked": question.mask_names,
        "method": " or ".join(names.methods[method.name] for method in space.genome.methods),
        "methods": [
            (names.methods[m.name], [names.parameters[p] for p in space.parameters_of(m)]) for m in space.genome.methods
        ],
        "parameters": [
            (names.parameters[p], round(g.low * scale(g)), round(g.high * scale(g)), scale(g), p)
            for p, g in by_parameter.items()
        ],
        "tasks": [(names.tasks[task], *question.tasks[task]) for task in tasks],
        "hidden_tasks": len(question.tasks) - len(tasks),
        "constraints": [names.text(text, REASON) for text in question.constraints],
        "weights": [question.weights.get(task, 0.0) for task in tasks] if question.weights else [],
        "models": model_rows(question, names, tasks, detail),
        "columns": [names.column(gene, filters) for gene in sheet.columns],
        "slices": [names.slices[label] for label in sheet.slices],
        "hidden_slices": len(space.slices) - len(sheet.slices),
        "geometry": geometry_lines(question, sheet, names, detail),
        "rows": [trial_row(trial, question, sheet, names, tasks) for trial in shown_trials(question, detail)],
        "failed": [
            trial_row(trial, question, sheet, names, tasks, detail) for trial in failed_trials(question, detail)
        ],
        "suggestions": [
            plain_row(f"S{place}", genes, sheet, names, score, stderr)
            for place, (genes, score, stderr) in enumerate(question.suggestions[: detail.suggestions], start=1)
        ],
        "effects": effect_lines(question, sheet, evidence, names, filters, detail),
        "scored": len(question.inside),
        "interactions": [
            (where(i.first, sheet, names, filters), where(i.second, sheet, names, filters), i.strength)
            for i in evidence.interactions
            if i.first in sheet.numbers and i.second in sheet.numbers
        ][: detail.interactions],
        "choices": method_lines(question, sheet, names),
        "predictions": question.predictions[-LAST:],
        "spearman": calibration(question.predictions),
        "bias": fmean(a - b for a, b in question.predictions) if question.predictions else 0.0,
        "predicted": len(question.predictions),
        "noise": fmean(t.score.stderr for t in question.scored if t.score) if question.scored else 0.0,
        "questions": best.score.items if best and best.score else 0,
        "best": best.value if best else None,
        "stagnation": len(question.trials) - 1 - [*question.trials].index(best) if best else 0,
        "target": target(question),
    }
