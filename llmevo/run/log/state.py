"""The state of a run: the fold of its log, shared by the loop and every reader."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any, Self

from llmevo.config import parse_logged
from llmevo.errors import ConfigError, RunError
from llmevo.evaluation.judges.verdicts import VerdictMemory
from llmevo.evaluation.questions import clusters_of_texts
from llmevo.evaluation.score import Score, averaged, pooled
from llmevo.evaluation.standard_errors import Clusters, distinct, one_after_another
from llmevo.evaluation.tasks.task import Task
from llmevo.run.log import events
from llmevo.run.log.changes import applied
from llmevo.run.log.worker_history import WorkerHistory
from llmevo.search.objectives.constraints import ConstraintChecker, HeldoutConstraint, check_heldout, paired
from llmevo.search.objectives.objective import COUNT, Objective, front
from llmevo.search.trial import Candidate, Trial

ORIGIN = "the run's config"
"""The origin that a ConfigError of a logged config names."""


@dataclass
class RunState:
    """A run as its log says so far. Only `apply` changes it."""

    started: events.RunStarted | None = None
    """The first event, with the changes of later `resumed` events."""
    resumed: list[events.Resumed] = field(default_factory=list[events.Resumed])
    prompted: list[events.Prompted] = field(default_factory=list[events.Prompted])
    judged: list[events.Judged] = field(default_factory=list[events.Judged])
    verdicts: VerdictMemory = field(default_factory=VerdictMemory)
    """The verdicts of judges and voters."""
    candidates: dict[int, Candidate] = field(default_factory=dict[int, Candidate])
    recipes: dict[int, dict[str, object]] = field(default_factory=dict[int, dict[str, object]])
    trials: dict[int, Trial] = field(default_factory=dict[int, Trial])
    asked_later: dict[int, int] = field(default_factory=dict[int, int])
    """{candidate: the number of search questions then}, of those scored after the questions or models have changed."""
    selected: dict[int, events.Selected] = field(default_factory=dict[int, events.Selected])
    served: dict[tuple[int, str], events.Served] = field(default_factory=dict[tuple[int, str], events.Served])
    """Scores of finalists in the format in which they will be served, by candidate and set of questions."""
    failed_finalists: dict[tuple[int, str, str], events.Unscored] = field(
        default_factory=dict[tuple[int, str, str], events.Unscored]
    )
    """Finalists without a score, by candidate, step and set of questions."""
    told: list[events.Told] = field(default_factory=list[events.Told])
    heldout: dict[str, events.HeldOut] = field(default_factory=dict[str, events.HeldOut])
    failed_rows: dict[str, events.Unscored] = field(default_factory=dict[str, events.Unscored])
    """Held-out rows without a score, by their names."""
    finished: events.RunFinished | None = None
    workers: list[events.Worker] = field(default_factory=list[events.Worker])
    """The changes among the workers."""
    worker_history: WorkerHistory = field(default_factory=WorkerHistory)
    """The workers, and what they did."""
    generations: int = 0
    """How often candidates were asked for, the start rows included."""
    busy: float = 0.0
    """Seconds in which candidates were scored or the LLM was asked, with workers: steps at the same time count once,
    pauses between sessions do not count."""
    took: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    """{event: {part: seconds}} of all that was scored or failed: the sums of `seconds`."""
    answered: int = 0
    """Questions that models were asked, without those of scores that were taken over."""
    taken_over: int = 0
    """Scores that were taken over from an equal candidate."""
    _counted: datetime | None = None
    """Until when `busy` counts."""
    latest: datetime | None = None
    """The time of the last event."""
    searched: dict[int, Trial] = field(default_factory=dict[int, Trial])
    """Each candidate as the search scored it, which is what counts in the budget: a finalist that racing had stopped is
    asked the remaining questions later."""
    objective: Objective = field(default_factory=Objective)
    """The objective of the run's config."""

    @classmethod
    def fold(cls, log: Iterator[events.Event]) -> Self:
        state = cls()
        for event in log:
            state.apply(event)
        return state

    @property
    def rules(self) -> int:
        """See `events.RunStarted`; 0 before it."""
        return self.started.rules if self.started else 0

    @property
    def generation(self) -> int:
        """The number of the generation that was asked for last; 0 for the start rows."""
        return self.candidates[next(reversed(self.candidates))].generation if self.candidates else 0

    @property
    def seconds(self) -> float:
        """From the first event to the last, pauses included."""
        if self.started is None or self.latest is None:
            return 0.0
        # A clock may have been set back.
        return max(0.0, (self.latest - datetime.fromisoformat(self.started.time)).total_seconds())

    def apply(self, event: events.Event) -> None:
        self.latest = datetime.fromisoformat(event.time)
        if isinstance(event, events.Evaluated | events.Failed | events.Prompted) and not self._is_of_finals(event):
            took = event.seconds if isinstance(event, events.Prompted) else sum(event.seconds.values())
            since = (self.latest - self._counted).total_seconds() if self._counted else took
            self.busy += max(0.0, min(since, took))
        if isinstance(event, events.Evaluated | events.Failed | events.Prompted | events.Asked):
            self._counted = self.latest
        if isinstance(event, events.Scored | events.Failed | events.Unscored):
            self._spend(event)
        match event:
            case events.RunStarted():
                self.started = event
                self.objective = _objective_of(event)
            case events.Resumed():
                self._resume(event)
            case events.Prompted():
                self.prompted.append(event)
            case events.Judged():
                self.judged.append(event)
                self.verdicts.take(event)
            case events.Presented() | events.Voted():
                self.verdicts.take(event)
            case events.Worker():
                self.workers.append(event)
            case events.Asked():
                self.generations += 1
                self.candidates |= {candidate.id: candidate for candidate in event.read()}
                self.recipes |= {candidate["id"]: candidate["recipe"] for candidate in event.candidates}
            case events.Evaluated():
                candidate = self._candidate(event.candidate)
                if self.started and any(resumed.counts for resumed in self.resumed):
                    self.asked_later[event.candidate] = self.started.items
                self._add(Trial(candidate, self._sized(event), seconds=event.seconds))
                self._judge(candidate)
            case events.Selected():
                self._check_searched(event)
                self.selected[event.candidate] = event
                self._judge()
            case events.Served():
                self._check_searched(event)
                self.served[event.candidate, event.questions] = event
            case events.Failed():
                candidate = self._candidate(event.candidate)
                self._add(Trial(candidate, None, event.reason, event.seconds))
                self._judge(candidate)
            case events.Told():
                self.told.append(event)
            case events.HeldOut():
                self._check_searched(event)
                self.heldout[event.row] = event
                self.failed_rows.pop(event.row, None)
            case events.Unscored() if event.step == "heldout":
                self.heldout.pop(event.row, None)  # of an earlier best
                self.failed_rows[event.row] = event
            case events.Unscored():
                self._check_searched(event)
                assert event.candidate is not None
                self.failed_finalists[event.candidate, event.step, event.questions] = event
            case events.RunFinished():
                self.finished = event
        candidate = (
            self.candidates.get(event.candidate) if isinstance(event, events.Evaluated | events.Failed) else None
        )
        steady = self.started is not None and self.started.order == "steady"
        self.worker_history.take(event, candidate.generation if candidate else 0, steady)

    def _is_of_finals(self, event: events.Event) -> bool:
        """Whether a finalist, scored before, answers the questions that racing had spared it; in older logs these were
        taken for the search's.
        """
        scored = isinstance(event, events.Evaluated | events.Failed)
        return scored and self.rules > 3 and event.candidate in self.searched

    def _spend(
        self,
        event: events.Evaluated | events.Selected | events.Served | events.HeldOut | events.Failed | events.Unscored,
    ) -> None:
        took = self.took.setdefault(event.step if isinstance(event, events.Unscored) else event.event, {})
        for part, seconds in event.seconds.items():
            took[part] = took.get(part, 0.0) + seconds
        if not isinstance(event, events.Failed | events.Unscored):
            self.answered += event.items if event.seconds else 0
            self.taken_over += not event.seconds

    def _sized(self, event: events.Evaluated) -> Score:
        """The score, with the candidate's sizes among its tasks where an objective or a constraint is of one."""
        score = event.read()
        if not self.objective.counts_sizes or self.started is None:
            return score
        slices: Any = self.recipes[event.candidate].get("slices")
        ranges = [of["sources"][0]["layer_range"] for of in slices or [{"sources": [{"layer_range": [0, 0]}]}]]
        layers = [layer for start, stop in ranges for layer in range(start, stop)] or [*range(self.started.layers)]
        sizes = {"layers": float(len(layers))}
        if each := self.started.layer_parameters:
            sizes["parameters"] = float(self.started.other_parameters + sum(each[layer] for layer in layers))
        if active := self.started.active_parameters:
            head = self.started.head_parameters
            sizes["time"] = (head + sum(active[layer] for layer in layers)) / (head + sum(active))
        return replace(score, tasks={**score.tasks, **{name: {COUNT: value} for name, value in sizes.items()}})

    def _add(self, trial: Trial) -> None:
        """Keep the trials in the order of their candidates, whatever the order in which they arrive."""
        self.searched.setdefault(trial.candidate.id, trial)
        late = bool(self.trials) and trial.candidate.id not in self.trials and trial.candidate.id < max(self.trials)
        self.trials[trial.candidate.id] = trial
        if late:
            self.trials = dict(sorted(self.trials.items()))

    def _candidate(self, number: int) -> Candidate:
        if number not in self.candidates:
            raise RunError(f"the log scores candidate {number}, which was never asked for; it has been changed by hand")
        return self.candidates[number]

    def _check_searched(self, event: events.Selected | events.Served | events.HeldOut | events.Unscored) -> None:
        """Raise RunError where an event of the finals is of a candidate that the search has not scored."""
        if event.candidate is not None and event.candidate not in self.trials:
            raise RunError(
                f"the log has candidate {event.candidate} in the finals ({event.event}) and no score of it before; it"
                " has been changed by hand"
            )

    @property
    def constraint_checker(self) -> ConstraintChecker:
        return ConstraintChecker(
            self.objective, self.trials, {number: event.read() for number, event in self.selected.items()}
        )

    def _judge(self, candidate: Candidate | None = None) -> None:
        """Check a candidate, or all of them, against the constraints, once the start rows give the bounds."""
        begun = len(self.trials) == len(self.candidates) or any(c.generation for c in self.candidates.values())
        if not self.objective.constraints or not begun:
            return
        checker, single = self.constraint_checker, candidate is not None and candidate.generation
        for number in [candidate.id] if candidate and single else [*self.trials]:
            self.trials[number] = checker.judged(self.trials[number])

    def _resume(self, event: events.Resumed) -> None:
        """A finished run that is resumed is unfinished; scores of the finals on other questions or models are dropped,
        and those of the search are no longer compared question by question.
        """
        self.resumed.append(event)
        self.started = applied(self.started, event) if self.started else None
        for derived in ("tasks", "_clusters"):
            vars(self).pop(derived, None)
        self.finished = None
        changed = {change.key for change in event.forced}
        if any(key.startswith(("questions.", "sources.")) for key in changed):
            self.heldout = {}
        if event.counts:
            self.selected, self.served, self.failed_finalists, self.failed_rows = {}, {}, {}, {}
        compared = {"questions.search", "questions.search.answers", "questions.order"}  # question by question
        if event.counts and changed & compared:
            self.trials = {
                number: replace(trial, score=replace(trial.score, item_scores={})) if trial.score else trial
                for number, trial in self.trials.items()
            }

    def asked(self, questions: str) -> str:
        """Return the number of questions of `search` or `heldout`: `640`, or `640 answers to 512` where tasks share
        questions.
        """
        texts = self.started.texts.get(questions, {}) if self.started else {}
        count, unlike = sum(map(len, texts.values())), distinct(self.clusters(questions))
        if self.started and not count:  # an older log
            count = unlike = self.started.heldout_items if questions == "heldout" else self.started.items
        return f"{count}" if count == unlike else f"{count} answers to {unlike}"

    def clusters(self, *sets: str) -> Clusters:
        """Return the numbers of the questions of some sets, one after the other; equal ones are the same question."""
        return one_after_another(self._clusters.get(name, {}) for name in sets)

    @cached_property
    def _clusters(self) -> Mapping[str, Clusters]:
        started = self.started
        if started is None:
            return {}
        older = {name: texts for name, texts in started.texts.items() if name not in started.clusters}
        return {**started.clusters, **{name: clusters_of_texts(texts) for name, texts in older.items()}}

    def question_weights(self, tasks: Iterable[Task], questions: str) -> dict[str, float]:
        """Return {task: weight of the mean over its questions} of a set; groups are replaced by their tasks."""
        groups = self.started.groups.get(questions, {}) if self.started else {}
        found: dict[str, float] = {}
        for task in tasks:
            for name, share in groups.get(task.name, {task.name: 1.0}).items():
                found[name] = found.get(name, 0.0) + task.weight * share
        return found

    @cached_property
    def tasks(self) -> list[Task]:
        """The search tasks."""
        return parse_logged(self.started.config, ORIGIN).tasks if self.started else []

    @property
    def heldout_tasks(self) -> list[Task]:
        return parse_logged(self.started.config, ORIGIN).heldout_tasks if self.started else []

    @property
    def heldout_kept(self) -> list[HeldoutConstraint]:
        """Each constraint, checked for the best on the held-out questions; empty without these."""
        best, tasks = self.heldout.get("best"), self.heldout_tasks if self.objective.constraints else []
        if best is None or not tasks:
            return []
        metrics = {task.name: task.metric for task in tasks}
        pairs = {task: (other, metrics[other]) for task, other in paired([*self.objective.tasks], [*metrics]).items()}
        rows = {row.candidate: row.read() for row in self.heldout.values() if row.candidate is not None}
        return check_heldout(self.constraint_checker, pairs, rows, best.read())

    @property
    def unmet(self) -> str:
        """A text that names the constraints the best violates; empty where a candidate satisfies all."""
        best = self.best
        return f"no candidate keeps all constraints; the best {best.reason}" if best and best.violation else ""

    @property
    def front(self) -> list[Trial]:
        """The Pareto front of the fully evaluated trials, the highest score first; empty for a sum objective."""
        return front(self.asked_all, self.objective) if self.objective.pareto else []

    @property
    def best(self) -> Trial | None:
        """The trial to export: the leader, or once all finalists were scored on the selection questions, the best
        finalist by all its questions; with `engine.quantize`, once all were scored in that format, by these scores.
        Trials that satisfy the constraints come first; the earlier of equals. A finalist that failed is none of them.
        """
        if served := self.served_finalists:
            return max(served, key=lambda trial: (-trial.violation, self.as_served(trial).total))
        finalists = [self.trials[n] for n, event in self.selected.items() if event.generation == len(self.told)]
        asked = len(finalists) + len(self.failed_in("selected"))
        if finalists and asked == self.selected[finalists[0].candidate.id].finalists:
            return max(finalists, key=lambda trial: (-trial.violation, self.as_merged(trial).total))
        return self.leader

    @property
    def search_format(self) -> str:
        """The format that every candidate's weights were rounded to; empty where they kept the merge's type."""
        engine = (self.started.config.get("engine") or {}) if self.started else {}
        return (engine.get("quantize") or "") if engine.get("quantize_at") == "all" else ""

    @property
    def finals_sets(self) -> list[str]:
        """The sets of questions that a finalist answers."""
        return ["search", *(["selection"] if self.started and self.started.selection_items else [])]

    @property
    def served_finalists(self) -> list[Trial]:
        """The finalists, once all of them were scored in the format in which they will be served."""
        now = [event for event in self.served.values() if event.generation == len(self.told)]
        failed = self.failed_in("served")
        if not now or len(now) + len(failed) < now[0].finalists * len(self.finals_sets):
            return []
        without = {event.candidate for event in failed}
        return [self.trials[n] for n in dict.fromkeys(event.candidate for event in now) if n not in without]

    def failed_in(self, step: str) -> list[events.Unscored]:
        """Return the failures of the finalists in the step `selected` or `served`, since the search was last told."""
        failed = self.failed_finalists.values()
        return [event for event in failed if event.step == step and event.generation == len(self.told)]

    @property
    def failed_finals(self) -> list[events.Unscored]:
        """The finalists and held-out rows without a score."""
        return [*self.failed_in("selected"), *self.failed_in("served"), *self.failed_rows.values()]

    def as_merged(self, trial: Trial) -> Score:
        """Return a finalist's score on all its questions, the weights in the type of the search."""
        number = trial.candidate.id
        assert trial.score
        further = [self.selected[number].read()] if number in self.selected else []
        return self._pooled([trial.score, *further], ["search", "selection"][: 1 + len(further)])

    def as_served(self, trial: Trial) -> Score:
        """Return a finalist's score on the same questions, the weights rounded as they will be served."""
        sets = self.finals_sets
        return self._pooled([self.served[trial.candidate.id, questions].read() for questions in sets], sets)

    def _pooled(self, scores: Sequence[Score], sets: Sequence[str]) -> Score:
        return pooled(self.tasks, scores, self.clusters(*sets)) if self.rules > 3 else averaged(scores)

    @property
    def leader(self) -> Trial | None:
        """The trial with the highest score on the search questions."""
        if self.rules > 1 or self.objective.constraints:  # a stopped trial is not known to satisfy them
            return next(iter(self.asked_all), None)
        scored = [trial for trial in self.trials.values() if trial.score]
        return max(scored, key=lambda trial: trial.value, default=None)

    @property
    def asked_all(self) -> list[Trial]:
        """The fully evaluated trials, the best first, the earlier of equals."""
        scored, later = {n: trial.score for n, trial in self.trials.items() if trial.score}, self.asked_later
        items = max((score.items for n, score in scored.items() if n not in later), default=0)
        whole = [self.trials[n] for n, score in scored.items() if score.items == later.get(n, items)]
        return sorted(whole, key=lambda trial: trial.rank, reverse=True)

    @property
    def best_parent(self) -> Trial | None:
        return self.best_of("parent")

    def best_of(self, origin: str) -> Trial | None:
        """Return the trial of an origin with the highest search score; None where none has a score."""
        trials = [trial for trial in self.trials.values() if trial.score and trial.candidate.origin == origin]
        return max(trials, key=lambda trial: trial.rank, default=None)


def _objective_of(started: events.RunStarted) -> Objective:
    """Return the objective; for most logs without reading the whole config, which takes long."""
    search = started.config.get("search") or {}
    if not started.config.get("constraints") and search.get("objective", "sum") == "sum":
        return Objective()
    try:
        return parse_logged(started.config, ORIGIN).objective
    except ConfigError:  # of another version: readers that need the config report it
        return Objective()


def failures(state: RunState) -> list[str]:
    """Return the reasons of the failed candidates, in their order."""
    return [trial.reason for trial in state.trials.values() if trial.score is None]
