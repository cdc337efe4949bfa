"""The progress of a run and the time it still takes, from its events."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Self

from llmevo.config import Config
from llmevo.llm.client import patience
from llmevo.run.log.events import OF_BEST, PARENT, HeldOut, Selected, Served, Unscored
from llmevo.run.log.state import RunState
from llmevo.run.spending import Spending

ECONOMY = 0.1
"""With n times as many questions in a call, each takes n ** -ECONOMY of the time; used until such a call is measured.
From 35 to 640 questions of the quickstart, one CPU thread took 15 to 25 % less."""

Timed = Sequence[tuple[int, Mapping[str, float]]]
"""The questions of each scoring, and its seconds by their kind."""


def _total(seconds: Mapping[str, float]) -> float:
    return sum(seconds.values())


def _repeated(seconds: Mapping[str, float]) -> float:
    """The seconds of a scoring, without those of a preparation, which is made once."""
    return _total(seconds) - seconds.get("prepare", 0.0)


def _mean(values: Iterable[float]) -> float:
    return fmean(given) if (given := [*values]) else 0.0


@dataclass(frozen=True)
class Left:
    """The seconds that a run is likely to take still."""

    now: float = 0.0
    """For the step in progress: the LLM's answers, a candidate, a finalist or a held-out row."""
    later: float = 0.0
    """For all steps after it."""

    def after(self, since: float = 0.0) -> float:
        """Return the seconds left when the step in progress began `since` seconds ago. A step that takes longer than
        expected changes nothing in the later ones.
        """
        return max(0.0, self.now - max(0.0, since)) + self.later


@dataclass(frozen=True)
class Pace:
    """The seconds of each kind of step so far, of all workers together."""

    candidate: float
    """A candidate of the search, raced or taken over as often as so far."""
    asking: float
    """The LLM's answers for a generation."""
    finalist: float
    served: float
    """A finalist, on one set of questions, in the format in which it will be served."""
    heldout: float

    @classmethod
    def of(cls, state: RunState, config: Config, others: Sequence[RunState] = ()) -> Self:
        """Return the pace of a run that has begun and of `others` on the same engine."""
        started, states = state.started, [state, *others]
        assert started
        trials = [trial for each in states for trial in each.trials.values()]
        searched = [trial for trial in trials if trial.candidate.generation] or [t for t in trials if t.seconds]
        # Scores that were taken over took no time.
        scored = [(trial.score.items, trial.seconds) for trial in trials if trial.score and trial.seconds]
        selected = [(each.items, each.seconds) for of in states for each in of.selected.values() if each.seconds]
        heldout = [each.seconds for of in states for each in of.heldout.values() if each.seconds]
        size = max(1.0, started.items / (config.racing.looks if config.racing else 1))
        calls = [(size, scored), (started.selection_items, selected)]
        asked = [_answering(each) for each in states if each.prompted]
        return cls(
            candidate=_mean(_repeated(trial.seconds) for trial in searched),
            asking=sum(seconds for seconds, _ in asked) / max(1, sum(generations for _, generations in asked)),
            finalist=_mean(_repeated(seconds) for _, seconds in selected) or _expected(started.selection_items, calls),
            served=_mean(_repeated(event.seconds) for of in states for event in of.served.values() if event.seconds)
            or (_expected(started.items, calls) + _expected(started.selection_items, calls)) / len(state.finals_sets),
            heldout=_mean(map(_repeated, heldout)) or _expected(started.heldout_items, calls),
        )


@dataclass(frozen=True)
class Concurrency:
    """The workers of a run, for the time that steps take when several are taken at the same time."""

    ready: int
    """How many score now; 1 without workers."""
    efficiency: float
    """The share of their time in which they scored candidates: at the end of a generation some wait for the last."""

    @classmethod
    def of(cls, state: RunState, config: Config, each: float) -> Self:
        """Return the workers of a run whose candidates take `each` seconds of one worker.

        The efficiency is that of the search so far and, with the weight of one candidate a worker, the share of workers
        that a generation of equally slow candidates needs.
        """
        started, worker_history = state.started, state.worker_history
        if started is None or not (started.workers > 1 or worker_history.members):
            return cls(1, 1.0)
        ready = worker_history.expected if worker_history.questions else max(worker_history.ready, started.workers)
        ready = max(1, ready)
        size = max(1, _generation(state, config))
        at_once = 1 if not started.order else ready if started.order == "steady" else size / math.ceil(size / ready)
        # Of candidates that are being scored, about half is done.
        done = worker_history.search.busy + (
            min(waiting(state), ready) * each / 2 if worker_history.search.busy else 0.0
        )
        capacity = worker_history.search.capacity + ready * each
        expected = at_once / ready
        return cls(ready, min(1.0, (done + at_once * each) / capacity) if each else expected)

    def one_by_one(self, count: int, each: float) -> float:
        """Return the time of `count` candidates of `each` seconds, one after the other as workers are free."""
        return count * each / (self.ready * self.efficiency)

    def together(self, count: int, each: float) -> float:
        """Return the time of `count` steps of `each` seconds that are all begun at once."""
        return math.ceil(count / self.ready) * each


def _answering(state: RunState) -> tuple[float, int]:
    """The seconds of the LLM's answers, and the generations since the first one: earlier ones had nothing to ask."""
    asked = [event.generation for event in state.prompted]
    generations = max(asked[-1], _last_generation(state)) - asked[0] + 1
    return sum(event.seconds for event in state.prompted), generations


def _expected(items: int, calls: Sequence[tuple[float, Timed]]) -> float:
    """The seconds of scoring `items` questions in one call, from earlier scorings and the questions in each of their
    calls; the rate of the last kind of call counts.
    """
    merges, rate, size = list[float](), 0.0, 1.0
    for questions, scorings in calls:
        if asked := sum(asked for asked, _ in scorings):
            merging = [seconds.get("merge", 0.0) for _, seconds in scorings]
            rate, size = (sum(_repeated(seconds) for _, seconds in scorings) - sum(merging)) / asked, questions
            merges += merging
    if not items or not merges:
        return 0.0
    return _mean(merges) + items * rate * min(1.0, (size / items) ** ECONOMY)


def left(state: RunState, config: Config, others: Sequence[RunState] = ()) -> Left:
    """Return the time that a run still takes for the rest of the search, the finals and the held-out rows.

    `others` are runs of the same comparison: they have the same pace, and their scores are taken over in no time.
    """
    started = state.started
    if started is None or state.finished:
        return Left()
    pace, ahead, unscored = Pace.of(state, config, others), candidates_left(state, config), waiting(state)
    known = _Known.by(others, state)
    answered = bool(state.prompted) and state.prompted[-1].generation > _last_generation(state)
    generations = math.ceil((ahead - unscored) / _generation(state, config)) - (ahead > 0 and answered)
    finalists = max(0, _finalists_left(state, config) - known.finalists)
    again = _served_left(state, config)
    rows = _rows_left(state, config, known)
    candidates = max(0, ahead - known.start_rows)
    concurrency = Concurrency.of(state, config, pace.candidate)
    begun = min(unscored, candidates) if started.order == "strict" and state.worker_history.members else 0
    # While the LLM is asked in the order `steady`, workers go on: its time is in that of the candidates.
    asking = 0.0 if started.order == "steady" and state.worker_history.members else pace.asking
    generation = _generation_left(state, concurrency, pace.candidate) if begun else 0.0
    steps = (
        generations * asking,
        generation + concurrency.one_by_one(candidates - begun, pace.candidate),
        concurrency.together(finalists, pace.finalist),
        concurrency.together(again, pace.served),
        concurrency.together(rows, pace.heldout),
    )
    if begun:
        now = generation
    elif unscored or (ahead and answered):
        now = concurrency.one_by_one(1, pace.candidate) if candidates else 0.0
    elif ahead:
        now = asking
    else:
        now = pace.finalist if finalists else pace.served if again else pace.heldout if rows else 0.0
    return Left(now, max(0.0, sum(steps) - now))


def _generation_left(state: RunState, concurrency: Concurrency, each: float) -> float:
    """The time until all candidates of the last generation are scored, from their scores and the time so far."""
    size = sum(candidate.generation == _last_generation(state) for candidate in state.candidates.values())
    alone = 0 if _last_generation(state) else 1  # the first start row
    whole = alone * each + (concurrency.together(size - 1, each) if alone else concurrency.one_by_one(size, each))
    return max(whole - state.worker_history.generation, 0.0)


@dataclass(frozen=True)
class _Known:
    """The steps ahead of a run that equal runs have taken already."""

    start_rows: int
    finalists: int
    rows: set[str]
    """Held-out rows; see `_held_out`."""

    @classmethod
    def by(cls, others: Sequence[RunState], state: RunState) -> Self:
        def start(of: RunState, numbers: Iterable[int]) -> set[str]:
            """The recipes of start rows."""
            return {json.dumps(of.recipes[n], sort_keys=True) for n in numbers if not of.candidates[n].generation}

        scored = {recipe for other in others for recipe in start(other, other.trials)}
        selected = {recipe for other in others for recipe in start(other, other.selected)}
        asked = start(state, state.candidates) or scored
        return cls(
            start_rows=len((scored & asked) - start(state, state.trials)),
            finalists=len(selected - start(state, state.selected)),
            rows={row for other in others for row in _held_out(other)},
        )


def seconds_left(state: RunState, config: Config) -> float:
    """Return the time that a run takes from its last event on."""
    return left(state, config).after()


def seconds_spent(state: RunState) -> float:
    """Return the time of scoring and of the LLM so far, without pauses between sessions."""
    scored = [*state.trials.values(), *state.selected.values(), *state.served.values(), *state.heldout.values()]
    failed = [*state.failed_finalists.values(), *state.failed_rows.values()]
    return sum(_total(each.seconds) for each in (*scored, *failed)) + sum(event.seconds for event in state.prompted)


def candidates_left(state: RunState, config: Config) -> int:
    """Return how many candidates the search has still to score; 0 once it is over."""
    unscored, spending = waiting(state), Spending(config.search.budget, state)
    if not unscored and state.trials and not spending.next_size(_population(state, config)):
        return 0
    return max(unscored, spending.evaluations_ahead)


def waiting(state: RunState) -> int:
    """Return how many candidates of the last generation are not scored yet."""
    return len(state.candidates) - len(state.trials)


def _last_generation(state: RunState) -> int:
    return max((candidate.generation for candidate in state.candidates.values()), default=0)


def _generation(state: RunState, config: Config) -> int:
    """The size of the next generation: that of the last one, for optimizers may give fewer candidates than asked."""
    last = _last_generation(state)
    return sum(c.generation == last for c in state.candidates.values()) if last else _population(state, config)


def _population(state: RunState, config: Config) -> int:
    genes = len(state.started.genes) if state.started else 1
    return config.search.population_of(genes)


def _finalists_left(state: RunState, config: Config) -> int:
    if state.started is None or not state.started.selection_items:
        return 0
    chosen: list[Selected | Unscored] = [e for e in state.selected.values() if e.generation == len(state.told)]
    chosen += state.failed_in("selected")
    most = finalists_at_most(config.search.finalists, len(config.constraints), _origins(state))
    return max(0, (chosen[0].finalists if chosen else most) - len(chosen))


def _served_left(state: RunState, config: Config) -> int:
    """Scorings of finalists in the format in which they will be served; on each set of questions one."""
    if state.started is None or not config.engine.finals_format:
        return 0
    now: list[Served | Unscored] = [each for each in state.served.values() if each.generation == len(state.told)]
    now += state.failed_in("served")
    chosen = [*now, *(event for event in state.selected.values() if event.generation == len(state.told))]
    most = finalists_at_most(config.search.finalists, len(config.constraints), _origins(state))
    return max(0, (chosen[0].finalists if chosen else most) * len(state.finals_sets) - len(now))


def _rows_left(state: RunState, config: Config, known: _Known) -> int:
    """Rows still to be held out: the base, the start rows but the user's recipes, and the best, unless it is one of
    them.
    """
    if state.started is None or not state.started.heldout_items:
        return 0
    genome, best = config.genome, state.best
    start = [c for c in state.candidates.values() if not c.generation and c.origin in ("parent", "uniform")]
    failed = {trial.candidate.id for trial in state.trials.values() if trial.score is None}
    rows = {candidate.note or candidate.origin for candidate in start if candidate.id not in failed}
    if genome.base_model and genome.base_model not in [m for method in genome.methods for m in genome.merged(method)]:
        rows.add("base")
    held = state.heldout.get("best") or state.failed_rows.get("best")
    done = best is not None and (best.candidate in start or (held is not None and held.candidate == best.candidate.id))
    if "coefficient" in _origins(state):
        rows.add("coefficient")
    # The best is held out in both forms: see `finals.hold_out`.
    both = [row for row in _rows(state) if row.kind in ("served", "plain")]
    other = bool(config.engine.quantize) and not (best and both and both[0].candidate == best.candidate.id)
    return len(rows - _held_out(state) - known.rows) + (candidates_left(state, config) > 0 or not done) + other


def _held_out(state: RunState) -> set[str]:
    """The names of the rows but the best; that of the merge with one weight for all models is `coefficient`."""
    rows = [row for row in _rows(state) if row.kind not in OF_BEST]
    return {row.kind if row.kind == "coefficient" else row.row.removesuffix(PARENT) for row in rows}


def _rows(state: RunState) -> list[HeldOut | Unscored]:
    """The held-out rows so far, those that failed among them."""
    return [*state.heldout.values(), *state.failed_rows.values()]


def finalists_at_most(count: int, constraints: int, origins: Sequence[str]) -> int:
    """Return the largest number of finalists: the config's, the best parent, the uniform merge, the best merge with one
    weight for all models, and the parents of relative constraints. `origins` are those of the start rows.
    """
    return count + 2 + ("coefficient" in origins) + constraints


def heldout_rows(origins: Sequence[str], both: bool = False) -> int:
    """Return the largest number of held-out rows: base, parents, uniform merge, the best merge with one weight for all
    models, and the best, or `both` its forms with `engine.quantize`. `origins` are those of the start rows.
    """
    return 2 + both + sum(origin in ("parent", "uniform") for origin in origins) + ("coefficient" in origins)


def _origins(state: RunState) -> list[str]:
    """The origins of the start rows."""
    return [candidate.origin for candidate in state.candidates.values() if candidate.generation == 0]


def llm_wait(state: RunState, config: Config) -> tuple[str, float | None] | None:
    """Return the LLM's name and the seconds until its time-out, if it has one, where the next event of a run is the
    LLM's answer; else None.
    """
    started = state.started
    if started is None or not started.proposer or state.finished or waiting(state):
        return None
    if not state.told and not (started.rules > 2 and started.style == "chat" and config.search.optimizer == "llm"):
        return None  # others have start rows that wait for no answer
    if not candidates_left(state, config):
        return None
    last = state.prompted[-1] if state.prompted else None
    lost = last is not None and last.reply is None and last.calls > 0
    llm = config.llm
    limit = patience(llm.timeout, 0 if lost else llm.retries) if started.proposer == "openai" else None
    return (last.model if last else llm.model or "the LLM"), limit


def votes_at_most(config: Config, candidates: int, origins: Sequence[str], selected: bool) -> int:
    """Return the largest number of votes in a run of so many candidates: for each but the first of every set of
    questions, which has no rival. `origins` are those of the start rows.
    """
    search, heldout = (sum(t.votes.pairs for t in tasks if t.votes) for tasks in (config.tasks, config.heldout_tasks))
    finalists = finalists_at_most(config.search.finalists, len(config.constraints), origins) if selected else 0
    return search * (candidates - 1 + max(0, finalists - 1)) + heldout * (heldout_rows(origins) - 1)


def votes(state: RunState, config: Config) -> tuple[int, int]:
    """Return the votes that a person has given, and the largest number of votes in the whole run."""
    given = sum(len(poll.votes) for poll in state.verdicts.polls.values())
    # Before the first trial a budget in minutes says nothing of the number of candidates.
    if state.started is None or state.finished or not state.trials:
        return given, given
    candidates = max(len(state.candidates), len(state.trials) + Spending(config.search.budget, state).evaluations_ahead)
    most = votes_at_most(config, candidates, _origins(state), state.started.selection_items > 0)
    return given, max(given, most)
