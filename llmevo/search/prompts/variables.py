"""The variables of the chat prompt's templates: what is known about the search, shortened to a level of detail."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

from llmevo.errors import plural
from llmevo.models.cards import one_line
from llmevo.search.evidence import (
    Effect,
    Evidence,
    Flips,
    TaskEffect,
    Verdict,
    best_parent,
    calibration,
    contrasts,
    estimate_effects,
    flips,
    gap,
    mean_and_error,
    metric_of,
    stderr_of,
    target,
    task_effects,
    verdict,
)
from llmevo.search.prompts.meanings import meanings, sums
from llmevo.search.prompts.names import Names
from llmevo.search.prompts.question import Belief, Proposed, Question
from llmevo.search.prompts.table import GeneTable, scale
from llmevo.search.space import SPLIT, Gene, Genes
from llmevo.search.trial import Trial

BEST = 8  # recipes in the short form
PAIRED = 10  # of the best recipes, whose differences to the best one tell their standard error
ENDING = 2  # prompts before the last one that are told that the end is near
PREDICTIONS = 6  # earlier predictions that are listed
RECENT = 8  # predictions that the mean error is of
REASON = 160  # characters of the violated constraints of a recipe
NAMED = ("parent", "uniform", "coefficient", "user", "llm")  # origins that are shown; others are numeric optimizers'


@dataclass(frozen=True)
class Detail:
    """The length of each part of a prompt."""

    trials: int = 200
    """Recipes with their scores."""
    suggestions: int = 3
    cosines: int = 60
    """Of all slices together; norms are shown where there are any cosines."""
    samples: int = 3
    """Questions of each task before there are scores; later one, where there is any."""
    text: int = 160
    """Characters of a question."""
    card: int = 300
    """Characters of a model's card and of a task's description."""
    effects: int = 6
    """Of each task."""
    interactions: int = 5
    examples: int = 2
    """Lost questions of each task."""
    said: int = 12
    """Earlier proposals."""
    claims: int = 8
    """Hypotheses and beliefs, each."""
    analysis: int = 600
    """Characters of the last analysis."""
    failures: int = 3
    reason: int = 160
    """Characters of the reason of a failure."""
    tasks: int = 12
    """Tasks with scores: those with the largest weights."""
    models: int = 16
    """Models with scores: the best."""
    names: int = 40
    """Characters of a name."""
    meanings: bool = True
    """What each parameter does."""
    rows: int = 12
    """Recipes in templates of earlier versions, the contrasts included."""
    contrasts: int = 4
    all_effects: int = 64
    """Effects in templates of earlier versions."""


def _levels(*changes: dict[str, int]) -> tuple[Detail, ...]:
    found = [Detail()]
    for change in changes:
        found.append(replace(found[-1], **change))
    return tuple(found)


DETAILS = _levels(
    {"cosines": 24, "trials": 120},
    {"trials": 70, "text": 120, "card": 220, "examples": 1, "said": 10},
    {"trials": 50, "cosines": 12, "interactions": 3, "reason": 100, "effects": 4, "tasks": 8},
    {"trials": 36, "samples": 1, "said": 8, "claims": 6, "card": 150, "analysis": 400},
    {
        "trials": 26,
        "failures": 2,
        "reason": 80,
        "tasks": 6,
        "models": 12,
        "rows": 10,
        "contrasts": 3,
        "all_effects": 24,
    },
    {"trials": 18, "cosines": 0, "text": 80, "card": 80, "effects": 3, "said": 6, "suggestions": 2, "claims": 4},
    {"trials": 12, "examples": 0, "samples": 0, "analysis": 200, "tasks": 5, "models": 8, "names": 28, "said": 4},
    {"trials": 8, "card": 0, "failures": 1, "reason": 60, "rows": 6, "contrasts": 2, "all_effects": 12, "tasks": 4},
    {"trials": 5, "effects": 1, "interactions": 1, "claims": 2, "said": 2, "suggestions": 1, "tasks": 3, "models": 6},
    {"trials": 3, "interactions": 0, "claims": 0, "analysis": 0, "rows": 4, "contrasts": 1, "all_effects": 4},
    {"trials": 2, "rows": 2, "contrasts": 0, "all_effects": 0, "effects": 0, "said": 0},
    {"tasks": 2, "models": 4, "names": 16},
    {"meanings": False},
    {"trials": 1, "tasks": 1, "models": 2},
)
"""From the fullest to the barest; the first that fits is used."""


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
    items: int = 0
    """The questions that it was asked."""
    violates: bool = False
    """Whether it violates a constraint."""


@dataclass(frozen=True)
class ModelRow:
    """A model in the prompt."""

    name: str
    score: float
    tasks: str
    best: str
    """The tasks at which it is the best of all models."""
    id: int
    card: str


@dataclass(frozen=True)
class TaskRow:
    """A task in the prompt."""

    name: str
    factor: float
    metric: str
    weight: float
    """Its current weight where each task is an objective of its own."""
    same: str
    """The task that asks the same questions."""
    chance: str
    description: str
    samples: list[str]
    """Questions with their right answers, each in a line."""
    questions: int
    """Of a full evaluation; 0 where the number is not known."""


@dataclass(frozen=True)
class GapRow:
    """A task at which the best recipe is compared with the best model."""

    task: str
    lead: str
    """`75 against calendar 91 (-16±7)`."""
    flips: str
    """`lost 5 questions, gained 1; of the lost, alone answer also: words 3, family 1`."""
    examples: list[str]


class Facts:
    """A question's statistics, the same at every level of detail."""

    def __init__(self, question: Question) -> None:
        self.question = question

    @cached_property
    def evidence(self) -> Evidence:
        return estimate_effects(self.question)

    @cached_property
    def task_effects(self) -> list[TaskEffect]:
        return task_effects(self.question)

    @cached_property
    def flips(self) -> list[Flips]:
        return flips(self.question)

    @cached_property
    def verdicts(self) -> list[Verdict]:
        return [verdict(self.question, hypothesis) for hypothesis in self.question.hypotheses]

    @cached_property
    def ranked(self) -> list[Trial]:
        """The scored points, worst first; parents are shown among the models, unless one is the best."""
        question = self.question
        ranked = sorted(question.inside, key=lambda trial: trial.value)
        return [trial for trial in ranked if trial.candidate.origin != "parent" or trial is question.best]

    def questions_of(self, task: str) -> int:
        """The questions of a task in a full evaluation; 0 before there is one, or where it is not known."""
        whole = self.question.whole
        return max((len(trial.score.item_scores.get(task, ())) for trial in whole if trial.score), default=0)

    @cached_property
    def surprises(self) -> list[float]:
        """The expected minus the actual scores of the statistics' latest candidates; none where the score is one of
        several objectives, whose weights change.
        """
        numeric = [t for t in self.question.scored if t.candidate.origin == "gaussian" and not self.question.weights]
        found = [t.candidate.expected - t.value for t in numeric if t.candidate.expected is not None]
        return found[-RECENT:]

    @cached_property
    def paired_noise(self) -> float:
        """The standard error of the difference of a good recipe to the best one."""
        question, best = self.question, self.question.best
        near = [trial for trial in self.ranked[-PAIRED - 1 :] if trial is not best]
        gaps = [found.stderr for trial in near if best and (found := gap(question, trial, best))]
        return median(gaps) if gaps else 0.0


def method_lines(question: Question, table: GeneTable, names: Names) -> list[tuple[str, str]]:
    """Return (slice, scores of each method) for every choice of a merge method."""
    found: list[tuple[str, str]] = []
    for gene in table.choices:
        parts: list[str] = []
        for place, method in enumerate(gene.choices):
            values = [t.value for t in question.inside if gene.clamp(t.candidate.genes[gene.name]) == place]
            if values:
                mean, _ = mean_and_error(values)
                parts.append(f"{names.methods[method]} best {max(values):.3f} mean {mean:.3f} of {len(values)}")
        if parts:
            found.append((names.slices[gene.slice] if gene.slice else "all", "; ".join(parts)))
    return found


class Variables:
    """The variables of the templates."""

    def __init__(self, facts: Facts, table: GeneTable, detail: Detail) -> None:
        question = facts.question
        self._facts, self._question, self._table, self._detail = facts, question, table, detail
        self._names = Names(question.space, question.tasks, question.mask_names, detail.names)
        heaviest = sorted(question.tasks, key=lambda task: -abs(question.tasks[task][0]))[: detail.tasks]
        self._tasks = [task for task in question.tasks if task in heaviest]
        self._shows_filters = len(question.space.filters) > 1
        seen = [metric_of(question, trial, task) for trial in question.whole for task in self._tasks]
        self._hundredths = all(0 <= value <= 1 for value in seen if value is not None)

    def all(self) -> dict[str, Any]:
        question, table, names, tasks, detail = self._question, self._table, self._names, self._tasks, self._detail
        space, predictions, best, facts = question.space, self._predictions, question.best, self._facts
        recent = predictions[-RECENT:]  # the first, before any score, would decide the mean
        bias, bias_error = mean_and_error([expected - actual for expected, actual in recent])
        surprise, surprise_error = mean_and_error(facts.surprises)
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
            "single": question.is_one_metric,
            "start": self._start(),
            "meanings": meanings(space, names) if detail.meanings else {},
            "sums": sums(space, names),
            "sums_to_merge": any(map(space.genome.sums_to_merge, filter(space.genome.scales, space.genome.methods))),
            "roles": self._roles(),
            "hidden_tasks": len(question.tasks) - len(tasks),
            "constraints": [names.text(text, REASON) for text in question.constraints],
            "weights": [question.weights.get(task, 0.0) for task in tasks] if question.weights else [],
            "models": self._models(),
            "columns": [names.column(gene, self._shows_filters) for gene in table.columns],
            "slices": [names.slices[label] for label in table.slices],
            "hidden_slices": len(space.slices) - len(table.slices),
            "incumbent": table.rows(question.incumbent),
            "geometry": self._geometry(),
            "failed": [self._trial(trial, detail.reason) for trial in self._failed()],
            "suggestions": [
                self._row(f"S{place}", genes, score, stderr)
                for place, (genes, score, stderr) in enumerate(question.suggestions[: detail.suggestions], start=1)
            ],
            "scored": len(question.inside),
            "interactions": [
                (self._where(i.first), self._where(i.second), i.strength)
                for i in facts.evidence.interactions
                if i.first in table.numbers and i.second in table.numbers
            ][: detail.interactions],
            "choices": method_lines(question, table, names),
            "predictions": predictions[-PREDICTIONS:],
            "spearman": calibration(predictions),
            "bias": bias,
            "bias_error": bias_error,
            "predicted": len(recent),
            "surprises": facts.surprises,
            "surprise": surprise,
            "surprise_error": surprise_error,
            "noise": mean_and_error([t.score.stderr for t in question.whole if t.score])[0],
            "questions": best.score.items if best and best.score else 0,
            "best": best.score.total if best and best.score else None,
            "violated": best is not None and best.violation > 0,
            "stagnation": len(question.trials) - 1 - [*question.trials].index(best) if best else 0,
            **self._earlier_versions(),
            **self._progress(),
            **self._memory(),
        }

    @property
    def _predictions(self) -> Sequence[tuple[float, float]]:
        """Predictions of the total score, and what came of them; none with several objectives, whose weights change."""
        question = self._question
        return () if question.weights and not question.before_rules_4 else question.predictions

    def _start(self) -> str:
        """The start rows, which are scored without the LLM."""
        count = Counter(row.origin for row in self._question.start)
        said = {"uniform": f"the uniform merge{self._shared('uniform')}", "parent": "each model alone"}
        parts = [text for origin, text in said.items() if count[origin]]
        if count["coefficient"]:
            parts.append(f"{count['coefficient']} with other values that all models share{self._shared('coefficient')}")
        others = count.total() - sum(count[origin] for origin in (*said, "coefficient"))
        return ", ".join([*parts, *([plural(others, "given recipe")] if others else [])])

    def _shared(self, origin: str) -> str:
        """The weights that all models share in the start rows of an origin, as integers of the table."""
        weights = [gene for gene in self._table.numbers if gene.parameter == "weight"]
        rows = [row.genes for row in self._question.start if row.origin == origin]
        known = [genes for genes in rows if all(gene.name in genes for gene in weights)]  # of a mixture's rows not all
        shown = [{round(genes[gene.name] * scale(gene)) for gene in weights} for genes in known]
        values = [str(*values) for values in shown if len(values) == 1]
        return f" ({', '.join(values)})" if values else ""

    def _roles(self) -> list[str]:
        """The models that change roles at the layer `split`."""
        if not self._question.space.genome.split:
            return []
        shown = {model: self._names.models[name] for model, name in self._question.space.names.items()}
        pairs = zip(*self._question.space.genome.groups, strict=True)
        return [f"{shown[one]} with {shown[other]}" for one, other in pairs]

    def _earlier_versions(self) -> dict[str, Any]:
        """Variables that only templates of earlier versions use: runs resume with the templates in their log."""
        return {
            "tasks": [(self._names.tasks[task], *self._question.tasks[task]) for task in self._tasks],
            "rows": [self._trial(trial, REASON) for trial in self._shown()],
            "effects": self._effects(),
            "target": target(self._question),
        }

    def _progress(self) -> dict[str, Any]:
        """What the scores say."""
        question, names, tasks, detail = self._question, self._names, self._tasks, self._detail
        space = question.space
        facts, best, left = self._facts, self._question.best, max(0, self._question.budget - self._question.used)
        shown = self._recipes()
        slots = question.slots
        return {
            "task_rows": [self._task(task) for task in tasks],
            "hundredths": self._hundredths,
            "all_shares": all(metric.startswith(("acc", "exact_match")) for _, metric in question.tasks.values()),
            "unscored": [
                (names.models[name], self._card(name))
                for name in self._merged
                if name not in {trial.candidate.note for trial in question.parents}
            ][: detail.models],
            "base": names.models.get(space.names[base], "") if (base := space.genome.base_model) else "",
            "base_card": self._card(space.names[base]) if base and space.names[base] not in self._merged else "",
            "base_scores": self._base(),
            "depths": [(names.slices[label], _depth(label, question.space.layers)) for label in self._table.slices],
            "trials": [self._trial(trial, REASON) for trial in shown],
            "best_rows": [self._trial(trial, REASON) for trial in facts.ranked[-min(BEST, detail.trials) :]],
            "left_out": len(facts.ranked) - len(shown),
            "task_noise": self._task_noise(),
            "paired_noise": facts.paired_noise,
            "best_name": f"#{best.candidate.id}" if best else "",
            "gaps": self._gaps(),
            "task_effects": self._task_effects(),
            "left": left,
            "last": 0 < left <= slots,
            "ending": slots < left <= (ENDING + 1) * slots,
        }

    def _memory(self) -> dict[str, Any]:
        """What the LLM said before, and what came of it."""
        question, detail, verdicts = self._question, self._detail, self._facts.verdicts
        return {
            "proposals": [self._proposed(each) for each in question.proposed[-detail.said or len(question.proposed) :]],
            "task_bias": self._task_bias(),
            "hypotheses": [self._verdict(each) for each in verdicts[-detail.claims or len(verdicts) :]],
            "beliefs": [self._belief(each) for each in question.beliefs[: detail.claims]],
            "analysis": self._names.text(question.analysis, detail.analysis) if detail.analysis else "",
        }

    @property
    def _merged(self) -> list[str]:
        space = self._question.space
        return [space.names[reference] for reference in space.merged]

    def _task(self, task: str) -> TaskRow:
        question, detail = self._question, self._detail
        factor, metric = question.tasks[task]
        chance, texts = question.chances.get(task), question.texts.get(task, ())
        count = detail.samples if not question.scored else min(1, detail.samples)
        shown = not question.mask_names
        same = next((other for other in self._tasks if texts and question.texts.get(other) == texts), task)
        # Questions of a file are often sorted: they are taken from all over it.
        samples = (
            [texts[place * len(texts) // count] for place in range(min(count, len(texts)))]
            if shown and same == task
            else []
        )
        return TaskRow(
            self._names.tasks[task],
            factor,
            metric,
            question.weights.get(task, 0.0),
            self._names.tasks[same] if shown and same != task else "",
            f"{100 * chance:.0f}" if chance is not None and self._hundredths else "",
            self._names.text(question.descriptions.get(task, ""), detail.card) if shown and detail.card else "",
            [f"{self._line(text)} → {self._line(right, detail.text // 3)}" for text, right in samples],
            len(texts) or self._facts.questions_of(task),
        )

    def _line(self, text: str, longest: int | None = None) -> str:
        """A text in a line, without its middle if it is long."""
        longest, line = longest or self._detail.text, one_line(text)
        half = longest // 2
        return line if len(line) <= longest else f"{line[:half]}…{line[len(line) - (longest - half - 1) :]}"

    def _card(self, name: str) -> str:
        if self._question.mask_names or not self._detail.card:
            return ""
        return self._names.text(self._question.cards.get(name, ""), self._detail.card)

    def _base(self) -> str:
        """The base model's own scores: of a recipe without any weight, or of a candidate of that origin. Without them
        what would give them, where a table of zeros is the base.
        """
        space = self._question.space
        genome, weights = space.genome, [gene for gene in space.genes if gene.parameter == "weight"]
        for trial in self._question.scored:
            genes = trial.candidate.genes
            empty = genome.base_model and weights and not any(genes.get(gene.name, 1.0) for gene in weights)
            if trial.score and (trial.candidate.origin == "base" or empty):
                tasks = "" if self._question.is_one_metric else f"; {self._scores(trial)}"
                return f" #{trial.candidate.id}: {trial.score.total:.3f}{tasks}"
        reachable = weights and all(gene.low <= 0 for gene in weights) and not space.routing
        if reachable and not self._names.masked and all(genome.scales(method) for method in genome.methods):
            return " (all weights 0) has no score yet"
        return ""

    def _recipes(self) -> list[Trial]:
        """All scored recipes, worst first; of too many the best two thirds of the room and the worst."""
        ranked, most = self._facts.ranked, self._detail.trials
        if len(ranked) <= most:
            return ranked
        worst = most // 3
        return [*ranked[:worst], *ranked[worst - most :]]

    def _unit(self, value: float, digits: int = 0, sign: str = "") -> str:
        """A difference of a task's metric as it is shown: in hundredths where all are shares."""
        return f"{100 * value:{sign}.{digits}f}" if self._hundredths else f"{value:{sign}.3g}"

    def _task_noise(self) -> str:
        """The median standard error of each task's metric, of full evaluations."""
        question, found = self._question, list[str]()
        for task in self._tasks:
            errors = [error for trial in question.whole if (error := stderr_of(question, trial, task))]
            found.append(self._unit(median(errors)) if errors else "?")
        return " ".join(found) if {*found} - {"?"} else ""

    def _gaps(self) -> list[GapRow]:
        """The shown tasks, those with the largest losses first."""
        question, best, found = self._question, self._question.best, list[tuple[float, GapRow]]()
        if best is None or best.candidate.origin == "parent":
            return []
        changed = {flip.task: flip for flip in self._facts.flips}
        for task in self._tasks:
            parent, own = best_parent(question, task), metric_of(question, best, task)
            other = metric_of(question, parent, task) if parent else None
            if parent is None or own is None or other is None:
                continue
            name, lead = self._model(parent), gap(question, best, parent, task)
            error = f"±{self._unit(lead.stderr)}" if lead else ""
            text = f"{self._unit(own)} against {name} {self._unit(other)} ({self._unit(own - other, sign='+')}{error})"
            flip = changed.get(task)
            row = GapRow(
                self._names.tasks[task],
                text,
                self._flips(flip) if flip else "",
                self._examples(flip) if flip else [],
            )
            found.append((question.tasks[task][0] * (own - other), row))
        return [row for _, row in sorted(found, key=lambda pair: pair[0])]

    def _model(self, parent: Trial) -> str:
        return self._names.models.get(parent.candidate.note, "a model")

    def _flips(self, flip: Flips) -> str:
        text = f"lost {plural(len(flip.lost), 'question')}, gained {len(flip.gained)}"
        others = [(name, places) for name, places in flip.rescued.items() if name != flip.parent.candidate.note][:4]
        shown = ", ".join(f"{self._names.models.get(name, 'a model')} {len(places)}" for name, places in others)
        return text + (f"; of the lost, alone answer also: {shown}" if shown else "")

    def _task_effects(self) -> list[tuple[str, str]]:
        """(task, its strongest effects), the total first."""
        by_task: dict[str | None, list[str]] = {}
        for effect in self._facts.task_effects:
            own = by_task.setdefault(effect.task, [])
            if effect.gene in self._table.numbers and len(own) < self._detail.effects:
                ten = 10 / ((effect.gene.high - effect.gene.low) * scale(effect.gene))
                slope, error = (self._unit(ten * v, 1, s) for v, s in ((effect.slope, "+"), (effect.stderr, "")))
                own.append(f"{self._short_where(effect.gene)} {slope}±{error}")
        shown = () if self._question.is_one_metric else self._tasks
        names = {None: "score", **{task: self._names.tasks[task] for task in shown}}
        return [(shown, ", ".join(by_task[task])) for task, shown in names.items() if by_task.get(task)]

    def _short_where(self, gene: Gene) -> str:
        column = self._names.column(gene, self._shows_filters)
        slices = self._table.slices
        return column if len(slices) == 1 else f"{column} row {slices.index(gene.slice or '') + 1}"

    def _examples(self, flip: Flips) -> list[str]:
        """Lost questions with the right answer and the replies, each in a line."""
        question, best, texts = self._question, self._question.best, self._question.texts.get(flip.task, ())
        if question.mask_names or best is None or best.score is None or flip.parent.score is None:
            return []
        answers = best.score.item_scores.get(flip.task, ())
        if len(texts) != len(answers):
            return []
        short, found = self._detail.text // 3, list[str]()
        told = (f"#{best.candidate.id}", best.score), (self._model(flip.parent), flip.parent.score)
        for place in flip.lost[: self._detail.examples]:
            text, right = texts[place]
            line = f"{self._line(text)} → {self._line(right, short)}"
            for name, score in told:
                replies = score.replies.get(flip.task, ())
                if place < len(replies) and replies[place]:
                    line += f" | {name} said: {self._line(replies[place], short)}"
            found.append(line)
        return found

    def _proposed(self, proposed: Proposed) -> str:
        """A proposal and its fate in a line."""
        own, trial = proposed.suggestion, proposed.trial
        name = f"#{trial.candidate.id}" if trial else self._row("", own.genes).table
        purpose = f" ({own.purpose})" if own.purpose in ("exploit", "learn") else ""
        several = bool(self._question.weights) and not self._question.before_rules_4
        expected = "" if own.expected is None or several else f" {own.expected:.3f}"
        if trial is None:
            parts = [f"{name}{purpose}{expected}, not scored: {self._names.text(proposed.fate, 80)}"]
        elif trial.score is None:
            parts = [f"{name}{purpose}{expected} > failed"]
        else:
            parts = [f"{name}{purpose}" + ("" if several else f"{expected} > {trial.score.total:.3f}")]
            for task, value, actual in self._task_predictions(proposed):
                parts.append(f"{self._names.tasks[task]} {self._unit(value)}>{self._unit(actual)}")
        note = self._names.text(own.note, 80)
        return "; ".join(parts) + (f" ({note})" if note else "")

    def _task_predictions(self, proposed: Proposed) -> list[tuple[str, float, float]]:
        """(task, predicted, actual) of the shown tasks; a share that was given in hundredths is taken as one."""
        found: list[tuple[str, float, float]] = []
        for task in self._tasks:
            value = proposed.suggestion.predicted.get(task)
            actual = metric_of(self._question, proposed.trial, task) if proposed.trial else None
            if value is not None and actual is not None:
                found.append((task, value / 100 if self._hundredths and 1 < value <= 100 else value, actual))
        return found

    def _task_bias(self) -> str:
        """Mean predicted minus actual of the tasks with three predictions and more."""
        gaps: dict[str, list[float]] = {}
        for proposed in self._question.proposed:
            for task, value, actual in self._task_predictions(proposed):
                gaps.setdefault(task, []).append(value - actual)
        names, means = self._names.tasks, {task: mean_and_error(of)[0] for task, of in gaps.items() if len(of) > 2}
        return ", ".join(f"{names[task]} {self._unit(mean, sign='+')}" for task, mean in means.items())

    def _verdict(self, found: Verdict) -> str:
        claim, text = found.hypothesis, self._names.text(found.hypothesis.text, 120)
        about = self._names.tasks.get(claim.task, "a task") if claim.task else "score"
        if not (found.better and found.worse):
            return f"{found.word}: {text} ({about}; not both recipes are scored)"
        pair = f"#{found.better.candidate.id} over #{found.worse.candidate.id}"
        if found.effect is None:
            return f"{found.word}: {text} ({about}: {pair})"
        if claim.task:
            lead = f"{self._unit(found.effect.mean, sign='+')}±{self._unit(found.effect.stderr)}"
        else:
            lead = f"{found.effect.mean:+.3f}±{found.effect.stderr:.3f}"
        return f"{found.word}: {text} ({about}: {pair} by {lead})"

    def _belief(self, belief: Belief) -> str:
        """`model.weight row 2: higher, confidence 0.7 (reason)`, or `best at 0.4`."""
        genes = [gene for gene in self._table.numbers if gene.name in belief.genes]
        shown = ", ".join(map(self._short_where, genes[:3])) or "rows that are not shown"
        more = f" and {len(genes) - 3} more" if len(genes) > 3 else ""
        spread = "" if belief.spread is None else f"±{belief.spread:.2g}"
        where = {1: "higher", -1: "lower"}.get(belief.direction, "stay")
        said = where if belief.value is None else f"best at {belief.value:.3g}{spread}"
        why = self._names.text(belief.text, 80)
        return f"{shown}{more}: {said}, confidence {belief.confidence:.2g}" + (f" ({why})" if why else "")

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
        known = [effect for effect in self._facts.evidence.effects if effect.gene in self._table.numbers]
        kept = sorted(known, key=lambda effect: -abs(effect.strength))[: self._detail.all_effects]
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
        inside = trial.candidate.lies_in(self._question.space)
        row = self._row("", trial.candidate.genes) if inside else Row("", "", "")
        origin = trial.candidate.origin
        return Row(
            f"#{trial.candidate.id}" + (f" {origin}" if origin in NAMED else ""),
            row.table,
            row.methods,
            trial.score.total if trial.score else None,
            trial.score.stderr if trial.score and trial.score.items < self._question.items else 0.0,
            self._scores(trial),
            self._names.text(trial.reason, longest),
            trial.score.items if trial.score else 0,
            trial.violation > 0,
        )

    def _row(self, name: str, genes: Genes, score: float | None = None, stderr: float = 0.0) -> Row:
        table = " ".join(f"[{' '.join(map(str, integers))}]" for integers in self._table.rows(genes))
        methods = " ".join(self._names.methods[method] for method in self._table.methods(genes))
        if self._question.space.genome.split:
            methods = f"{methods} split {genes[SPLIT]:g}".strip()
        return Row(name, table, methods, score, stderr)

    def _scores(self, trial: Trial) -> str:
        values = [metric_of(self._question, trial, task) for task in self._tasks]
        return " ".join("?" if value is None else self._unit(value) for value in values)

    def _models(self) -> list[ModelRow]:
        """Each parent's own score, and the tasks at which it is the best."""
        names, tasks = self._names, self._tasks
        parents = [trial for trial in self._question.parents if trial.candidate.note in names.models]
        best: dict[str, list[str]] = {}
        for task in tasks:
            found = [(metric_of(self._question, trial, task), trial.candidate.note) for trial in parents]
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
                card = self._card(name)
                rows.append(ModelRow(names.models[name], total, self._scores(trial), listed, trial.candidate.id, card))
        return rows


def _depth(label: str, layers: int) -> str:
    """The depth of a slice's middle: 0 at the first layer, 1 at the last."""
    ends = [int(number) for number in re.findall(r"\d+", label)] or [0, layers - 1]
    return f"{(ends[0] + ends[-1]) / 2 / max(1, layers - 1):.2f}"
