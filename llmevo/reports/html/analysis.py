"""The numbers of a run's report, from its log alone: effects of genes, held-out questions, costs, and the luck in the
best score.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from llmevo.config import Config
from llmevo.evaluation.judges.verdicts import JudgeCost
from llmevo.evaluation.racing import difference
from llmevo.evaluation.tasks.task import Task, short
from llmevo.run.experiment import Experiment
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import read_log
from llmevo.search.evidence import estimate_effects, rank_normal
from llmevo.search.prompts.question import Question
from llmevo.search.space import Gene, SearchSpace
from llmevo.search.trial import Trial


@dataclass(frozen=True)
class Subject:
    """The run of a report: its log, config and search space. Loads no model and no task."""

    folder: Path
    """As the user named it; shown in commands."""
    state: RunState
    started: events.RunStarted
    config: Config
    space: SearchSpace

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Read a run's log, finished or not. Raises RunError when there is none, or when it has no beginning."""
        return cls.of_state(folder, RunState.fold(iter(read_log(folder))))

    @classmethod
    def of_state(cls, folder: Path, state: RunState) -> Self:
        """The same of a log that was read; it is used before the next event is added to the state."""
        config = Experiment.of_log(state.started, folder).config
        assert state.started is not None  # of_log has seen to that
        started = state.started
        space = SearchSpace(config.genome, started.layers, started.routers, bool(started.vocabulary))
        return cls(folder, state, started, config, space)

    @cached_property
    def scored(self) -> list[Trial]:
        return [trial for trial in self.state.trials.values() if trial.score]

    @cached_property
    def tasks(self) -> Mapping[str, str]:
        """The short name of each search task."""
        return dict(zip(self.config.counted, short([*self.config.counted]), strict=True))

    @cached_property
    def heldout_tasks(self) -> Mapping[str, tuple[str, Task]]:
        """The short name of each held-out task, and the task."""
        tasks = self.config.heldout_tasks
        names = short([task.name for task in tasks])
        return {task.name: (shown, task) for task, shown in zip(tasks, names, strict=True)}

    @cached_property
    def rival(self) -> events.HeldOut | None:
        """The parent with the highest held-out score."""
        parents = [row for row in self.state.heldout.values() if row.kind == "parent"]
        return max(parents, key=lambda row: row.score, default=None)

    def question(self, trials: Sequence[Trial] | None = None) -> Question:
        """Return what an LLM may know of these trials, by default of all."""
        trials = [*self.state.trials.values()] if trials is None else trials
        return Question(
            self.space,
            trials,
            self.config.counted,
            wanted=20,
            generation=0,
            sigma=0.0,
            used=len(trials),
            budget=len(trials),
            mask_names=self.config.llm.mask_names,
        )


# Effects of genes, by the evidence that an LLM is shown

ALL = "all tasks"
"""The name of the weighted total."""
CLEAR = 2.0
"""Standard errors from which an effect is named in words."""


@dataclass(frozen=True)
class GeneEffect:
    """One gene's effect on one task."""

    gene: Gene
    best: float
    """The best recipe's value."""
    lowest: float
    highest: float
    """The lowest and highest value tried."""
    effect: float
    """Points of the task (more is better) from the gene's lower bound to its upper one, all other genes held."""
    stderr: float
    earned: float
    """Points that the best recipe's value gives over the uniform merge's."""
    earned_stderr: float

    @property
    def strength(self) -> float:
        """The effect in standard errors."""
        return self.effect / self.stderr if self.stderr else 0.0


@dataclass(frozen=True)
class TaskEffects:
    """Every gene's effect on a task."""

    task: str
    """Its short name, or `all tasks`."""
    genes: Sequence[GeneEffect]
    """Empty while there are too few scores, or all are alike."""

    @property
    def clear(self) -> list[GeneEffect]:
        """The effects that set the best recipe apart from the uniform merge, the largest first."""
        told = [gene for gene in self.genes if abs(gene.strength) >= CLEAR and gene.earned]
        return sorted(told, key=lambda gene: -abs(gene.earned))


def effects(subject: Subject) -> list[TaskEffects]:
    """Return the effects on the total, and on every task of several."""
    found = [TaskEffects(ALL, _effects(subject, subject.scored))]
    for name, shown in subject.tasks.items() if len(subject.tasks) > 1 else ():
        weight, metric = subject.config.counted[name]
        sign = -1.0 if weight < 0 else 1.0
        trials = [
            replace(trial, score=replace(trial.score, total=sign * trial.score.tasks[name][metric]))
            for trial in subject.scored
            if trial.score and metric in trial.score.tasks.get(name, {})
        ]
        found.append(TaskEffects(shown, _effects(subject, trials)))
    return found


def _effects(subject: Subject, trials: Sequence[Trial]) -> list[GeneEffect]:
    question = subject.question(trials)
    evidence = estimate_effects(question)
    if not evidence.effects or subject.state.best is None:
        return []
    # The evidence is in standard deviations of the scores' normal ranks: as many points as the scores have of them.
    values = [trial.value for trial in question.inside]
    points = float(np.std(values)) / float(np.std(rank_normal(values)))
    uniform = subject.space.clamp(subject.space.uniform())
    found: list[GeneEffect] = []
    for of in evidence.effects:
        gene = of.gene
        best = subject.state.best.candidate.genes.get(gene.name, uniform[gene.name])
        step = gene.to_unit(best) - gene.to_unit(uniform[gene.name])
        slope, stderr = of.slope * points, of.stderr * points
        found.append(GeneEffect(gene, best, of.lowest, of.highest, slope, stderr, slope * step, stderr * abs(step)))
    return found


def layers_of(gene: Gene) -> str:
    """Return the layers on which a gene acts, in words."""
    where = "all layers" if gene.slice in (None, "all") else f"layers {gene.slice}"
    return f"{where}, {gene.filter}" if gene.filter else where


# Held-out questions


@dataclass(frozen=True)
class Item:
    """A question on which the best merge and its best parent differ."""

    question: str
    answer: str
    """The right one."""
    best: float
    rival: float
    best_reply: str
    rival_reply: str


@dataclass(frozen=True)
class TaskItems:
    """A task's questions, counted."""

    task: str
    questions: int
    gained: Sequence[Item]
    lost: Sequence[Item]
    difference: float
    """The mean of best minus parent in the counted metric, question by question; more is better."""
    stderr: float
    """Of that difference: smaller than that of either score, for both answer the same questions."""


def items(subject: Subject) -> list[TaskItems]:
    """Return the questions task by task; empty where the log lacks them, or there is no parent to compare with."""
    best, rival, texts = subject.state.heldout.get("best"), subject.rival, subject.started.texts.get("heldout", {})
    if best is None or rival is None:
        return []
    found: list[TaskItems] = []
    clusters, tasks = subject.state.clusters("heldout"), [task for _, task in subject.heldout_tasks.values()]
    weights = subject.state.question_weights(tasks, "heldout")
    for name, asked in texts.items():
        ours, theirs = best.item_scores.get(name, []), rival.item_scores.get(name, [])
        if not asked or not len(ours) == len(theirs) == len(asked):
            continue
        shown, _ = subject.heldout_tasks.get(name, (name, None))  # of a group, one of its tasks
        sign = -1.0 if weights.get(name, 1.0) < 0 else 1.0
        replies = [(of.replies.get(name) or [""] * len(asked)) for of in (best, rival)]
        rows = [
            Item(question, answer, score, other, reply, other_reply)
            for (question, answer), score, other, reply, other_reply in zip(asked, ours, theirs, *replies, strict=True)
        ]
        differences = [sign * (row.best - row.rival) for row in rows]
        stderr = difference({name: ours}, {name: theirs}, {name: 1.0}, clusters).error
        gained, lost = ([row for row, by in zip(rows, differences, strict=True) if by * way > 0] for way in (1, -1))
        found.append(TaskItems(shown, len(rows), gained, lost, float(np.mean(differences)), stderr))
    return found


# Time, tokens and money


@dataclass(frozen=True)
class Phase:
    """A part of the time."""

    name: str
    seconds: float
    share: float
    """Of the whole run."""


@dataclass(frozen=True)
class Costs:
    """The time, questions, tokens and money of a run."""

    phases: list[Phase]
    seconds: float
    """From the first event to the last, pauses included."""
    questions: int
    """Answered, those of finalists and held-out ones included."""
    cached: int
    """Scores taken over from equal candidates."""
    calls: int
    prompt_tokens: int
    completion_tokens: int
    money: float
    judges: str
    """The calls of LLM judges in words; empty without any."""
    together: bool
    """Whether the phases are the time of several workers together."""


def costs(subject: Subject) -> Costs:
    """Add up the log's own times, questions and tokens: those of all events that have `seconds`."""
    state = subject.state
    took = {kind: sum(parts.values()) for kind, parts in state.took.items()}
    of_candidates = [state.took.get(kind, {}) for kind in ("evaluated", "failed")]
    prepare, merge = (sum(parts.get(kind, 0.0) for parts in of_candidates) for kind in ("prepare", "merge"))
    finals = took.get("selected", 0.0) + took.get("served", 0.0)
    parts = {
        **({"preparing models": prepare} if prepare else {}),
        "merging candidates": merge,
        "scoring candidates": took.get("evaluated", 0.0) + took.get("failed", 0.0) - merge - prepare,
        **({"finalists": finals} if finals else {}),
        "held-out scores": took.get("heldout", 0.0),
        "the LLM": sum(event.seconds for event in state.prompted),
    }
    together, spent = bool(state.worker_history.members), sum(parts.values())
    whole = spent if together else max(state.seconds, spent)
    if not together:
        parts["loading, optimizer, pauses"] = whole - spent
    return Costs(
        phases=[Phase(name, seconds, seconds / whole if whole else 0.0) for name, seconds in parts.items()],
        seconds=state.seconds if together else whole,
        questions=state.answered,
        cached=state.taken_over,
        calls=sum(event.calls for event in state.prompted),
        prompt_tokens=sum(event.tokens.get("prompt", 0) for event in state.prompted),
        completion_tokens=sum(event.tokens.get("completion", 0) for event in state.prompted),
        money=sum(event.cost for event in state.prompted),
        judges=str(JudgeCost.of(state.judged)) if state.judged else "",
        together=together,
    )


# The winner's curse

FEWEST = 6
"""Candidates below which the luck in the best score is not estimated."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Corrected:
    """The highest score, and what the same choice gives on new questions."""

    score: float
    """As it was measured."""
    mean: float
    low: float
    """Of the 95 % interval."""
    high: float

    @property
    def luck(self) -> float:
        return self.score - self.mean


def corrected(subject: Subject) -> Corrected | None:
    """Return the highest search score without its luck; None where the log lacks the questions' scores of a task, or no
    candidate keeps the constraints, as the score did not choose then.

    Candidates that racing stopped are left out: they were too far behind to be chosen on other questions.
    """
    leader, counted = subject.state.leader, subject.config.counted
    asked = [trial for trial in subject.state.asked_all if not trial.violation]
    tables = [[trial.score.item_scores.get(name, []) for name in counted] for trial in asked if trial.score]
    sizes = {tuple(map(len, table)) for table in tables}
    if leader is None or leader.violation or len(sizes) != 1 or not all(next(iter(sizes))):
        return None
    found = bootstrap_corrected(tables, [weight for weight, _ in counted.values()])
    # The metric of a task that is no mean over questions would be weighed wrongly.
    return found if found and math.isclose(found.score, leader.value, abs_tol=1e-3) else None


def bootstrap_corrected(
    items: Sequence[Sequence[Sequence[float]]], weights: Sequence[float], seed: int = 0
) -> Corrected | None:
    """Correct the highest score for the luck of being chosen; None with under six candidates.

    `items[candidate][task]` are the scores of a task's questions; `weights` are those of the tasks.

    Bootstrap bias correction (Tsamardinos et al. 2018, https://doi.org/10.1007/s10994-018-5714-4): questions are drawn
    with replacement, the candidate that is best on them is chosen, and its score on the questions not drawn is averaged
    over the draws. All candidates answer the same questions, so their errors are correlated; the bootstrap keeps that,
    where a normal model with independent errors (shrinkage) overstates the luck. The estimate is slightly too low, as
    fewer questions choose.
    """
    if len(items) < FEWEST:
        return None
    tables = [np.array([candidate[task] for candidate in items], dtype=np.float64) for task in range(len(weights))]
    random = np.random.default_rng(seed)
    chosen_by, judged_by = np.zeros((RESAMPLES, len(items))), np.zeros((RESAMPLES, len(items)))
    for table, weight in zip(tables, weights, strict=True):
        count = table.shape[1]
        drawn = random.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
        left = np.where((drawn == 0).any(1)[:, None], drawn == 0, 1.0)
        chosen_by += weight * (drawn @ table.T) / count
        judged_by += weight * (left @ table.T) / left.sum(1)[:, None]
    found = judged_by[np.arange(RESAMPLES), chosen_by.argmax(1)]
    best = np.sum([weight * table.mean(1) for table, weight in zip(tables, weights, strict=True)], axis=0).max()
    low, high = np.quantile(found, [0.025, 0.975])
    return Corrected(float(best), float(found.mean()), float(low), float(high))
