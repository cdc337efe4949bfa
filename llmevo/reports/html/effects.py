"""What each gene did to each task's points, by the same evidence that an LLM is shown."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmevo.reports.html.subject import Subject
from llmevo.search.evidence import Effect, estimate_effects, rank_normal
from llmevo.search.space import Gene
from llmevo.search.trial import Trial

ALL = "all tasks"
"""What the weighted total is called."""


CLEAR = 2.0
"""Standard errors from which an effect is told in words."""


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
        """Those by which the best recipe stands out from the uniform merge, the largest first."""
        told = [gene for gene in self.genes if abs(gene.strength) >= CLEAR and gene.earned]
        return sorted(told, key=lambda gene: -abs(gene.earned))


def effects(subject: Subject) -> list[TaskEffects]:
    """Of the total, and of every task."""
    found = [TaskEffects(ALL, _effects(subject, subject.scored))]
    if len(subject.tasks) > 1:
        for name, shown in subject.tasks.items():
            found.append(TaskEffects(shown, _effects(subject, _on(subject, name))))
    return found


def _on(subject: Subject, name: str) -> list[Trial]:
    """The trials with a task's metric for their score; more is better."""
    weight, metric = subject.config.counted[name]
    sign = -1.0 if weight < 0 else 1.0
    return [
        replace(trial, score=replace(trial.score, total=sign * trial.score.tasks[name][metric]))
        for trial in subject.scored
        if trial.score and metric in trial.score.tasks.get(name, {})
    ]


def _effects(subject: Subject, trials: Sequence[Trial]) -> list[GeneEffect]:
    question = subject.question(trials)
    evidence = estimate_effects(question)
    if not evidence.effects or subject.state.best is None:
        return []
    # The evidence is in standard deviations of the scores' normal ranks: as many points as the scores have of them.
    values = [trial.value for trial in question.inside]
    points = float(np.std(values)) / float(np.std(rank_normal(values)))
    space = subject.space
    best, uniform = subject.state.best.candidate.genes, space.clamp(space.uniform())
    return [
        _gene(effect, best.get(effect.gene.name, uniform[effect.gene.name]), uniform, points)
        for effect in evidence.effects
    ]


def _gene(effect: Effect, best: float, uniform: dict[str, float], points: float) -> GeneEffect:
    gene = effect.gene
    step = gene.to_unit(best) - gene.to_unit(uniform[gene.name])
    slope, stderr = effect.slope * points, effect.stderr * points
    return GeneEffect(gene, best, effect.lowest, effect.highest, slope, stderr, slope * step, stderr * abs(step))


def place(gene: Gene) -> str:
    """Where a gene acts, in words."""
    where = "all layers" if gene.slice in (None, "all") else f"layers {gene.slice}"
    return f"{where}, {gene.filter}" if gene.filter else where
