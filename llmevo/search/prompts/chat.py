"""The prompt for chat models, reasoning or not: facts that a numeric optimizer cannot use, answered in JSON.

It is made anew each time, and has a bounded number of tokens for any number of trials, genes, tasks and models.
"""

import json
import math
import re
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from llmevo.llm.templates import Templates
from llmevo.search.evidence import Effect, Evidence, calibration, contrasts, estimate_effects, target
from llmevo.search.prompts.names import Names
from llmevo.search.prompts.question import Prompt, Question
from llmevo.search.prompts.reading import read
from llmevo.search.prompts.schema import answer_model
from llmevo.search.prompts.table import GeneTable, scale
from llmevo.search.space import Gene, Genes
from llmevo.search.trial import Trial

FILES = ("chat_system.j2", "chat_user.j2", "repair.j2")
"""The templates of the prompt, and of the message about an answer that cannot be used."""

TOKENS = 6000  # of a whole prompt, at most
PREDICTIONS = 6  # earlier predictions that are listed
REASON = 160  # characters of the violated constraints of a recipe
NAMED = ("parent", "uniform", "coefficient", "user", "llm")  # origins that are shown; others are numeric optimizers'

PIECE = re.compile(r"[A-Za-z]+|[^\W_A-Za-z]|\n+|[^\S\n]+(?=[^A-Za-z])|[^\w\s]|_")
"""Words; digits and letters of other scripts; ends of lines; spaces that no word takes with it; signs."""


def tokens(text: str) -> int:
    """Estimate the tokens of a text from above: one for every digit and sign, and for four letters of a word."""
    return sum(_tokens(piece) for piece in PIECE.findall(text))


def _tokens(piece: str) -> int:
    if not piece.isascii():
        return len(piece.encode())
    return math.ceil(len(piece) / 4) if piece[0].isalpha() else 1


@dataclass(frozen=True)
class Detail:
    """The length of each part of a prompt."""

    rows: int = 12
    """Recipes with their scores, the contrasts included."""
    contrasts: int = 4
    effects: int = 64
    interactions: int = 5
    suggestions: int = 3
    cosines: int = 60
    """Of all slices together; norms are shown where there are any cosines."""
    failures: int = 3
    reason: int = 160
    """Characters of the reason of a failure."""
    tasks: int = 12
    """Tasks with scores: those with the largest weights."""
    models: int = 16
    """Models with scores: the best."""
    names: int = 40
    """Characters of a name."""


DETAILS = (
    Detail(),
    Detail(names=28, cosines=24),
    Detail(interactions=3, cosines=24, effects=32, tasks=8, reason=100, names=28),
    Detail(10, 3, 24, 3, 3, 12, 2, 80, 6, 12, 24),
    Detail(8, 3, 16, 3, 2, 12, 2, 80, 5, 8, 24),
    Detail(6, 2, 12, 2, 2, 0, 2, 60, 4, 8, 20),
    Detail(4, 1, 8, 1, 1, 0, 1, 40, 3, 6, 16),
    Detail(2, 0, 0, 0, 1, 0, 1, 40, 2, 4, 16),
)
"""From the fullest to the barest; the first that fits into `TOKENS` is used."""


def ask(question: Question, templates: Templates, seed: int) -> Prompt:
    """Return the prompt for a chat model, in as much detail as fits."""
    table, evidence = GeneTable.of(question.space, seed), estimate_effects(question)
    schema = answer_model(question, table).model_json_schema()
    texts: list[str] = []
    for detail in DETAILS:
        variables = _Variables(question, table, evidence, detail).all()
        texts = [templates.render(file, **variables, schema=json.dumps(schema)) for file in FILES[:2]]
        if sum(map(tokens, texts)) <= TOKENS:
            break
    return Prompt(
        tuple({"role": role, "content": text} for role, text in zip(("system", "user"), texts, strict=True)),
        read=lambda text: read(text, question, table, evidence),
        schema=schema,
        generation=question.generation,
        seed=seed,
        question=question,
    )


@dataclass(frozen=True)
class Row:
    """A recipe in the prompt."""

    name: str
    table: str
    """`[31 50] [62 90]`: a list for every slice."""
    methods: str
    score: float | None = None
    stderr: float = 0.0
    tasks: str = ""
    """The score of every shown task, in their order."""
    reason: str = ""
    """The reason of a failure, or the violated constraints."""


@dataclass(frozen=True)
class ModelRow:
    """A model in the prompt."""

    name: str
    score: float
    tasks: str
    best: str
    """The tasks at which it is the best of all models."""


def method_lines(question: Question, table: GeneTable, names: Names) -> list[tuple[str, str]]:
    """Return (slice, scores of each method) for every choice of a merge method."""
    found: list[tuple[str, str]] = []
    for gene in table.choices:
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


class _Variables:
    """The variables of the templates."""

    def __init__(self, question: Question, table: GeneTable, evidence: Evidence, detail: Detail) -> None:
        self._question, self._table, self._evidence, self._detail = question, table, evidence, detail
        self._names = Names(question.space, question.tasks, question.mask_names, detail.names)
        heaviest = sorted(question.tasks, key=lambda task: -abs(question.tasks[task][0]))[: detail.tasks]
        self._tasks = [task for task in question.tasks if task in heaviest]
        self._shows_filters = len(question.space.filters) > 1

    def all(self) -> dict[str, Any]:
        question, table, names, tasks, detail = self._question, self._table, self._names, self._tasks, self._detail
        space, predictions = question.space, question.predictions
        best = max(question.inside, key=lambda trial: trial.value, default=None)
        by_parameter = {gene.parameter: gene for gene in table.numbers}
        return {
            "q": question,
            "masked": question.mask_names,
            "method": " or ".join(names.methods[method.name] for method in space.genome.methods),
            "methods": [
                (names.methods[method.name], [names.parameters[name] for name in space.parameters_of(method)])
                for method in space.genome.methods
            ],
            "parameters": [
                (names.parameters[p], round(g.low * scale(g)), round(g.high * scale(g)), scale(g), p)
                for p, g in by_parameter.items()
            ],
            "tasks": [(names.tasks[task], *question.tasks[task]) for task in tasks],
            "hidden_tasks": len(question.tasks) - len(tasks),
            "constraints": [names.text(text, REASON) for text in question.constraints],
            "weights": [question.weights.get(task, 0.0) for task in tasks] if question.weights else [],
            "models": self._models(),
            "columns": [names.column(gene, self._shows_filters) for gene in table.columns],
            "slices": [names.slices[label] for label in table.slices],
            "hidden_slices": len(space.slices) - len(table.slices),
            "geometry": self._geometry(),
            "rows": [self._trial(trial, REASON) for trial in self._shown()],
            "failed": [self._trial(trial, detail.reason) for trial in self._failed()],
            "suggestions": [
                self._row(f"S{place}", genes, score, stderr)
                for place, (genes, score, stderr) in enumerate(question.suggestions[: detail.suggestions], start=1)
            ],
            "effects": self._effects(),
            "scored": len(question.inside),
            "interactions": [
                (self._where(i.first), self._where(i.second), i.strength)
                for i in self._evidence.interactions
                if i.first in table.numbers and i.second in table.numbers
            ][: detail.interactions],
            "choices": method_lines(question, table, names),
            "predictions": predictions[-PREDICTIONS:],
            "spearman": calibration(predictions),
            "bias": fmean(expected - actual for expected, actual in predictions) if predictions else 0.0,
            "predicted": len(predictions),
            "noise": fmean(t.score.stderr for t in question.scored if t.score) if question.scored else 0.0,
            "questions": best.score.items if best and best.score else 0,
            "best": best.value if best else None,
            "stagnation": len(question.trials) - 1 - [*question.trials].index(best) if best else 0,
            "target": target(question),
        }

    def _geometry(self) -> list[tuple[str, str, str]]:
        """(slice, norms in ten-thousandths of the base's, cosines in hundredths of the most similar pairs)."""
        names, slices = self._names, [facts for facts in self._question.geometry if facts.slice in self._table.slices]
        count = self._detail.cosines // max(1, len(slices))
        if not count:
            return []
        shown: list[tuple[str, str, str]] = []
        for facts in slices:
            kept = sorted(facts.cosines, key=lambda pair: -abs(facts.cosines[pair]))[:count]
            pairs = [(*pair.split("/", 1), cosine) for pair, cosine in facts.cosines.items() if pair in kept]
            norms = [*facts.norms.items()][: self._detail.models]
            shown.append(
                (
                    names.slices[facts.slice],
                    ", ".join(f"{names.models[model]} {round(10_000 * norm)}" for model, norm in norms),
                    ", ".join(f"{names.models[a]}/{names.models[b]} {round(100 * cosine)}" for a, b, cosine in pairs),
                )
            )
        return shown

    def _effects(self) -> list[tuple[str, list[str]]]:
        """(slice, lines) of the genes with the strongest effects."""
        known = [effect for effect in self._evidence.effects if effect.gene in self._table.numbers]
        kept = sorted(known, key=lambda effect: -abs(effect.strength))[: self._detail.effects]
        lines = {
            label: [self._effect(effect) for effect in known if effect in kept and effect.gene.slice == label]
            for label in self._table.slices
        }
        return [(self._names.slices[label], of) for label, of in lines.items() if of]

    def _effect(self, effect: Effect) -> str:
        """`model.parameter 43 (0-120) +12±5 +20`: best value, values tried, effect, best quarter minus the rest."""
        gene = effect.gene
        span = (gene.high - gene.low) * scale(gene)
        # The effect of ten steps, in hundredths of a standard deviation of the scores.
        slope, error = (round(100 * value * 10 / span) for value in (effect.slope, effect.stderr))
        values = effect.lowest, effect.highest, self._question.incumbent[gene.name]
        low, high, value = (round(v * scale(gene)) for v in values)
        column = self._names.column(gene, self._shows_filters)
        return f"{column} {value} ({low} to {high}) {slope:+d}±{error} {round(effect.contrast * span):+d}"

    def _where(self, gene: Gene) -> str:
        column = self._names.column(gene, self._shows_filters)
        return column if len(self._table.slices) == 1 else f"{column} in {self._names.slices[gene.slice or 'all']}"

    def _shown(self) -> list[Trial]:
        """The best trials and some bad ones near the best; worst first."""
        question, detail = self._question, self._detail
        near = contrasts(question, detail.contrasts) if len(question.inside) > detail.rows else []
        taken = {trial.candidate.id for trial in near}
        ranked = sorted((t for t in question.inside if t.candidate.id not in taken), key=lambda trial: trial.value)
        return sorted([*near, *ranked[len(near) - detail.rows :]], key=lambda trial: trial.value)

    def _failed(self) -> list[Trial]:
        """The latest failure of each reason; the latest last."""
        latest = {trial.reason: trial for trial in self._question.trials if not trial.score}
        return sorted(latest.values(), key=lambda trial: trial.candidate.id)[-self._detail.failures :]

    def _trial(self, trial: Trial, longest: int) -> Row:
        """A trial, with a reason of at most so many characters."""
        inside = self._question.space.contains(trial.candidate.genes)
        row = self._row("", trial.candidate.genes) if inside else Row("", "", "")
        origin = trial.candidate.origin
        return Row(
            f"#{trial.candidate.id}" + (f" {origin}" if origin in NAMED else ""),
            row.table,
            row.methods,
            trial.score.total if trial.score else None,
            trial.score.stderr if trial.score else 0.0,
            self._scores(trial),
            self._names.text(trial.reason, longest),
        )

    def _row(self, name: str, genes: Genes, score: float | None = None, stderr: float = 0.0) -> Row:
        table = " ".join(f"[{' '.join(map(str, integers))}]" for integers in self._table.rows(genes))
        methods = " ".join(self._names.methods[method] for method in self._table.methods(genes))
        return Row(name, table, methods, score, stderr)

    def _scores(self, trial: Trial) -> str:
        values = [self._metric(trial, task) for task in self._tasks]
        hundredths = all(0 <= value <= 1 for value in values if value is not None)
        return " ".join(
            "?" if value is None else f"{100 * value:.0f}" if hundredths else f"{value:.3g}" for value in values
        )

    def _metric(self, trial: Trial, task: str) -> float | None:
        """The counted metric of a task; None where a score lacks it."""
        return trial.score.tasks.get(task, {}).get(self._question.tasks[task][1]) if trial.score else None

    def _models(self) -> list[ModelRow]:
        """Each parent's own score, and the tasks at which it is the best."""
        names, tasks = self._names, self._tasks
        parents = [trial for trial in self._question.parents if trial.candidate.note in names.models]
        best: dict[str, list[str]] = {}
        for task in tasks:
            found = [(self._metric(trial, task), trial.candidate.note) for trial in parents]
            known = [(value, name) for value, name in found if value is not None]
            if len({value for value, _ in known}) > 1:
                weight = self._question.tasks[task][0]  # negative where lower is better
                _, name = max(known, key=lambda entry: entry[0] * weight)
                best.setdefault(name, []).append(names.tasks[task])
        kept = sorted(parents, key=lambda trial: -trial.value)[: self._detail.models]
        rows: list[ModelRow] = []
        for trial in parents:
            if trial in kept:
                name, total = trial.candidate.note, trial.score.total if trial.score else trial.value
                own = best.get(name, [])
                listed = "all of them" if len(own) == len(tasks) > 2 else ", ".join(own)
                rows.append(ModelRow(names.models[name], total, self._scores(trial), listed))
        return rows
