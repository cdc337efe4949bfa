"""What a run's log folds to: the one view of a run that the loop and every reader share."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self

from llmevo.config import parse_config
from llmevo.errors import ConfigError, RunError
from llmevo.evaluation.judges.memory import VerdictMemory
from llmevo.evaluation.standard_errors import clusters, distinct
from llmevo.evaluation.tasks.task import Task
from llmevo.run.log import events
from llmevo.run.log.changes import applied
from llmevo.search.objectives.constraints import ConstraintChecker, Held, held, paired
from llmevo.search.objectives.objective import Objective
from llmevo.search.objectives.pareto import front
from llmevo.search.trial import Candidate, Trial

ORIGIN = "the run's config"
"""What a ConfigError of one from a log says it is in."""


@dataclass
class RunState:
    """What the log says so far. Changes only by `apply`; the live run and every reader share this."""

    started: events.RunStarted | None = None
    """How the run began, with what `resumed` events have changed of it since."""
    resumed: list[events.Resumed] = field(default_factory=list[events.Resumed])
    prompted: list[events.Prompted] = field(default_factory=list[events.Prompted])
    judged: list[events.Judged] = field(default_factory=list[events.Judged])
    verdicts: VerdictMemory = field(default_factory=VerdictMemory)
    """What judges and voters have said."""
    candidates: dict[int, Candidate] = field(default_factory=dict[int, Candidate])
    recipes: dict[int, dict[str, object]] = field(default_factory=dict[int, dict[str, object]])
    trials: dict[int, Trial] = field(default_factory=dict[int, Trial])
    selected: dict[int, events.Selected] = field(default_factory=dict[int, events.Selected])
    told: list[events.Told] = field(default_factory=list[events.Told])
    heldout: dict[str, events.HeldOut] = field(default_factory=dict[str, events.HeldOut])
    finished: events.RunFinished | None = None
    latest: datetime | None = None
    """When the last event was written."""
    aims: Objective = field(default_factory=Objective)
    """What the run's config searches for."""

    @classmethod
    def fold(cls, log: Iterator[events.Event]) -> Self:
        state = cls()
        for event in log:
            state.apply(event)
        return state

    @property
    def seconds(self) -> float:
        """From the first event to the last, pauses included."""
        if self.started is None or self.latest is None:
            return 0.0
        return (self.latest - datetime.fromisoformat(self.started.time)).total_seconds()

    def apply(self, event: events.Event) -> None:
        self.latest = datetime.fromisoformat(event.time)
        match event:
            case events.RunStarted():
                self.started = event
                self.aims = _aims_of(event)
            case events.Resumed():
                self._resume(event)
            case events.Prompted():
                self.prompted.append(event)
            case events.Judged():
                self.judged.append(event)
                self.verdicts.take(event)
            case events.Presented() | events.Voted():
                self.verdicts.take(event)
            case events.Asked():
                self.candidates |= {candidate.id: candidate for candidate in event.read()}
                self.recipes |= {candidate["id"]: candidate["recipe"] for candidate in event.candidates}
            case events.Evaluated():
                candidate = self._candidate(event.candidate)
                self.trials[candidate.id] = Trial(candidate, event.read(), seconds=event.seconds)
                self._judge(candidate)
            case events.Selected():
                self._candidate(event.candidate)
                self.selected[event.candidate] = event
                self._judge()
            case events.Failed():
                candidate = self._candidate(event.candidate)
                self.trials[candidate.id] = Trial(candidate, None, event.reason, event.seconds)
                self._judge(candidate)
            case events.Told():
                self.told.append(event)
            case events.HeldOut():
                self.heldout[event.row] = event
            case events.RunFinished():
                self.finished = event

    def _candidate(self, number: int) -> Candidate:
        if number not in self.candidates:
            raise RunError(f"the log scores candidate {number}, which was never asked for; it has been changed by hand")
        return self.candidates[number]

    @property
    def keeping(self) -> ConstraintChecker:
        """What holds trials against the constraints."""
        return ConstraintChecker(
            self.aims, self.trials, {number: event.read() for number, event in self.selected.items()}
        )

    def _judge(self, candidate: Candidate | None = None) -> None:
        """Hold a candidate against the constraints, or all of them, once the start rows have told the bounds."""
        begun = len(self.trials) == len(self.candidates) or any(c.generation for c in self.candidates.values())
        if not self.aims.constraints or not begun:
            return
        keeping, single = self.keeping, candidate is not None and candidate.generation
        for number in [candidate.id] if candidate and single else [*self.trials]:
            self.trials[number] = keeping.judged(self.trials[number])

    def _resume(self, event: events.Resumed) -> None:
        """A finished run that goes on is not finished. Rows held out with other questions or models do not compare."""
        self.resumed.append(event)
        self.started = applied(self.started, event) if self.started else None
        self.finished = None
        if any(change.key.startswith(("questions.", "sources.")) for change in event.forced):
            self.heldout = {}

    def asked(self, questions: str) -> str:
        """How many questions one scoring on `search` or `heldout` asks: `640`, or `640 answers to 512` where tasks ask
        the same ones.
        """
        texts = self.started.texts.get(questions, {}) if self.started else {}
        count, unlike = sum(map(len, texts.values())), distinct(clusters(texts))
        if self.started and not count:  # an older log
            count = unlike = self.started.heldout_items if questions == "heldout" else self.started.items
        return f"{count}" if count == unlike else f"{count} answers to {unlike}"

    @property
    def heldout_tasks(self) -> list[Task]:
        """What is held out, as the run's config says."""
        return parse_config(self.started.config, ORIGIN).heldout_tasks if self.started else []

    @property
    def heldout_kept(self) -> list[Held]:
        """Each constraint on the held-out questions, for the best; empty where nothing is held out."""
        best, tasks = self.heldout.get("best"), self.heldout_tasks if self.aims.constraints else []
        if best is None or not tasks:
            return []
        metrics = {task.name: task.metric for task in tasks}
        pairs = {task: (other, metrics[other]) for task, other in paired([*self.aims.tasks], [*metrics]).items()}
        rows = {row.candidate: row.read() for row in self.heldout.values() if row.candidate is not None}
        return held(self.keeping, pairs, rows, best.read())

    @property
    def unmet(self) -> str:
        """Which constraints the best violates, in words: no candidate keeps them all. Empty where one does."""
        best = self.best
        return f"no candidate keeps all constraints; the best {best.reason}" if best and best.violation else ""

    @property
    def front(self) -> list[Trial]:
        """The Pareto front of the candidates that were asked everything, the highest score first; empty where the
        objective is a sum.
        """
        return front(self.asked_all, self.aims) if self.aims.pareto else []

    @property
    def best(self) -> Trial | None:
        """The trial to hand over: the one with the highest score, and once all finalists were asked further questions,
        the best of them by all they were asked. The earlier one of equals. Whoever keeps the constraints is better
        than whoever does not.
        """
        finalists = [self.trials[n] for n, event in self.selected.items() if event.generation == len(self.told)]
        if finalists and len(finalists) == self.selected[finalists[0].candidate.id].finalists:
            return max(finalists, key=lambda trial: (-trial.violation, self.pooled(trial)))
        return self.leader

    @property
    def leader(self) -> Trial | None:
        """The trial with the highest score on the search questions, of those that keep the constraints."""
        new = self.started is not None and self.started.rules > 1
        if new or self.aims.constraints:  # whether one that was stopped keeps them is not known
            return next(iter(self.asked_all), None)
        scored = [trial for trial in self.trials.values() if trial.score]
        return max(scored, key=lambda trial: trial.value, default=None)

    def pooled(self, trial: Trial) -> float:
        """A finalist's score on search and selection questions together."""
        score, further = trial.score, self.selected[trial.candidate.id]
        assert score
        return (score.total * score.items + further.score * further.items) / (score.items + further.items)

    @property
    def asked_all(self) -> list[Trial]:
        """The trials that were stopped by nothing, the best first, the earlier one of equals."""
        items = max((trial.score.items for trial in self.trials.values() if trial.score), default=0)
        whole = [trial for trial in self.trials.values() if trial.score and trial.score.items == items]
        return sorted(whole, key=lambda trial: trial.rank, reverse=True)

    @property
    def best_parent(self) -> Trial | None:
        return self.best_of("parent")

    def best_of(self, origin: str) -> Trial | None:
        """The trial of an origin with the highest search score; None where none has a score."""
        trials = [trial for trial in self.trials.values() if trial.score and trial.candidate.origin == origin]
        return max(trials, key=lambda trial: trial.rank, default=None)


def _aims_of(started: events.RunStarted) -> Objective:
    """Of most logs known without reading the whole config."""
    search = started.config.get("search") or {}
    if not started.config.get("constraints") and search.get("objective", "sum") == "sum":
        return Objective()
    try:
        return parse_config(started.config, ORIGIN).aims
    except ConfigError:  # of another version; whoever needs the config says so
        return Objective()


def failures(state: RunState) -> list[str]:
    """The reasons of the candidates that failed, in their order."""
    return [trial.reason for trial in state.trials.values() if trial.score is None]
