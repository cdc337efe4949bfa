"""How far a run is, and how long it still takes; read off its events."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from llmevo.config import Config
from llmevo.llm.client import patience
from llmevo.run.log.state import RunState
from llmevo.run.spending import Spending

ECONOMY = 0.1
"""A question takes less time the more are asked in one call: n ** -ECONOMY as much where n times as many are. Used only
until such a call has been measured. From 35 to 640 questions of the quickstart, one CPU thread took 15 to 25 % less."""


@dataclass(frozen=True)
class Left:
    """The seconds that a run is likely to take still."""

    now: float = 0.0
    """Of the step that goes on: the LLM's answers, a candidate, a finalist or a held-out row."""
    later: float = 0.0
    """Of all that comes after it."""

    def after(self, since: float = 0.0) -> float:
        """What is left when the step has gone on for `since` seconds. A step that takes longer than expected leaves
        what comes after it as it is.
        """
        return max(0.0, self.now - since) + self.later


@dataclass(frozen=True)
class Pace:
    """How many seconds each kind of step takes, by what has happened so far."""

    candidate: float
    """A candidate of the search, asked as much as racing has asked on average."""
    asking: float
    """What the LLM takes for a generation."""
    finalist: float
    heldout: float

    @classmethod
    def of(cls, state: RunState, config: Config, others: Sequence[RunState] = ()) -> Self:
        """From a run and `others` that are scored with the same engine. What was taken over from an equal candidate
        took no time, and counts as that.
        """
        states = [state, *others]
        trials = [trial for each in states for trial in each.trials.values()]
        selected = [event for each in states for event in each.selected.values()]
        heldout = [event for each in states for event in each.heldout.values()]
        searched = [trial for trial in trials if trial.candidate.generation] or trials
        answers = [_Answers.of(each) for each in states if each.prompted]
        started = state.started
        known = _Calls()
        if started:
            looks = config.racing.looks if config.racing else 1
            known.add([(t.score.items, t.seconds) for t in trials if t.score], max(1.0, started.items / looks))
            known.add([(event.items, event.seconds) for event in selected], started.selection_items)
        items = (started.selection_items, started.heldout_items) if started else (0, 0)
        return cls(
            candidate=_mean([_total(trial.seconds) for trial in searched]),
            asking=sum(each.seconds for each in answers) / max(1, sum(each.generations for each in answers)),
            finalist=_mean([_total(event.seconds) for event in selected]) or known.seconds(items[0]),
            heldout=_mean([_total(event.seconds) for event in heldout]) or known.seconds(items[1]),
        )


@dataclass(frozen=True)
class _Answers:
    """What the LLM has taken in a run."""

    seconds: float
    generations: int
    """From the first that it was asked in on: there may be some before it has anything to be told."""

    @classmethod
    def of(cls, state: RunState) -> Self:
        asked = [event.generation for event in state.prompted]
        generations = max(asked[-1], _last_generation(state)) - asked[0] + 1
        return cls(sum(event.seconds for event in state.prompted), generations)


class _Calls:
    """Scorings whose time is known; of their sizes the last is the one to reckon from."""

    def __init__(self) -> None:
        self._merges: list[float] = []
        self._rate, self._size = 0.0, 1.0

    def add(self, scored: Sequence[tuple[int, Mapping[str, float]]], size: float) -> None:
        """(questions, seconds) of scorings that ask `size` questions at once. Those that took no time say nothing."""
        timed = [(items, seconds) for items, seconds in scored if items and seconds]
        if timed:
            self._merges += [seconds.get("merge", 0.0) for _, seconds in timed]
            evaluated = sum(_total(seconds) - seconds.get("merge", 0.0) for _, seconds in timed)
            self._rate, self._size = evaluated / sum(items for items, _ in timed), size

    def seconds(self, items: int) -> float:
        """What a scoring of so many questions at once will take."""
        if not items or not self._merges:
            return 0.0
        return _mean(self._merges) + items * self._rate * min(1.0, (self._size / items) ** ECONOMY)


def left(state: RunState, config: Config, others: Sequence[RunState] = ()) -> Left:
    """What a run will take still: the rest of the search, the finals and what is held out, at the pace so far.

    `others` are runs whose pace is this one's too.
    """
    started = state.started
    if started is None or state.finished:
        return Left()
    pace, ahead, unscored = Pace.of(state, config, others), candidates_left(state, config), waiting(state)
    answered = bool(state.prompted) and state.prompted[-1].generation > _last_generation(state)
    generations = math.ceil((ahead - unscored) / _generation(state, config)) - (ahead > 0 and answered)
    finalists, rows = _finalists_left(state, config), _rows_left(state, config)
    steps = (generations * pace.asking, ahead * pace.candidate, finalists * pace.finalist, rows * pace.heldout)
    if unscored or (ahead and answered):
        now = pace.candidate
    elif ahead:
        now = pace.asking
    else:
        now = pace.finalist if finalists else pace.heldout if rows else 0.0
    return Left(now, max(0.0, sum(steps) - now))


def seconds_left(state: RunState, config: Config) -> float:
    """What a run is likely to take from its last event on."""
    return left(state, config).after()


def seconds_spent(state: RunState) -> float:
    """What scoring and the LLM have taken so far; the pauses between two sessions do not count."""
    scored = [*state.trials.values(), *state.selected.values(), *state.heldout.values()]
    return sum(_total(each.seconds) for each in scored) + sum(event.seconds for event in state.prompted)


def candidates_left(state: RunState, config: Config) -> int:
    """Candidates of the search that are still to be scored, as far as the budget goes; 0 once it is over."""
    unscored = waiting(state)
    if (
        not unscored
        and state.trials
        and not Spending(config.search.budget, state).next_size(_population(state, config))
    ):
        return 0
    return max(unscored, Spending(config.search.budget, state).evaluations_ahead)


def waiting(state: RunState) -> int:
    """How many candidates are asked for and not scored yet."""
    return len(state.candidates) - len(state.trials)


def _last_generation(state: RunState) -> int:
    return max((candidate.generation for candidate in state.candidates.values()), default=0)


def _generation(state: RunState, config: Config) -> int:
    """How many candidates the next generation has: as many as the last, for optimizers may give fewer than asked."""
    last = _last_generation(state)
    return sum(c.generation == last for c in state.candidates.values()) if last else _population(state, config)


def _population(state: RunState, config: Config) -> int:
    genes = len(state.started.genes) if state.started else 1
    return config.search.population_of(genes)


def _finalists_left(state: RunState, config: Config) -> int:
    """Those who reach the end are at most the finalists of the config, the best parent and the uniform merge, and the
    parents that constraints are counted from.
    """
    if state.started is None or not state.started.selection_items:
        return 0
    chosen = [event for event in state.selected.values() if event.generation == len(state.told)]
    most = finalists_at_most(config.search.finalists, len(config.constraints), _origins(state))
    return max(0, (chosen[0].finalists if chosen else most) - len(chosen))


def _rows_left(state: RunState, config: Config) -> int:
    """Models that are still to be held out: the base, the start rows that are no recipes of the user's, and the best,
    which is scored already where it is one of them.
    """
    if state.started is None or not state.started.heldout_items:
        return 0
    genome, best = config.genome, state.best
    start = [c for c in state.candidates.values() if not c.generation and c.origin in ("parent", "uniform")]
    failed = {trial.candidate.id for trial in state.trials.values() if trial.score is None}
    rows = {candidate.note or candidate.origin for candidate in start if candidate.id not in failed}
    if genome.base_model and genome.base_model not in [m for method in genome.methods for m in genome.merged(method)]:
        rows.add("base")
    held = state.heldout.get("best")
    known = best is not None and (best.candidate in start or (held is not None and held.candidate == best.candidate.id))
    coefficient = "coefficient" in _origins(state) and not any(r.kind == "coefficient" for r in state.heldout.values())
    return len(rows - state.heldout.keys()) + coefficient + (candidates_left(state, config) > 0 or not known)


def finalists_at_most(count: int, constraints: int, origins: Sequence[str]) -> int:
    """The config's number of finalists, the best parent, the uniform merge, the best other weight for all models, and
    the parents that constraints are counted from. `origins` are the start rows'.
    """
    return count + 2 + ("coefficient" in origins) + constraints


def heldout_rows(origins: Sequence[str]) -> int:
    """Models that are held out, at most: base, parents, uniform merge, the best other weight for all models, and the
    best. `origins` are the start rows'.
    """
    return 2 + sum(origin in ("parent", "uniform") for origin in origins) + ("coefficient" in origins)


def _origins(state: RunState) -> list[str]:
    """Of the start rows."""
    return [candidate.origin for candidate in state.candidates.values() if candidate.generation == 0]


def llm_wait(state: RunState, config: Config) -> tuple[str, float | None] | None:
    """Of a run whose next event is the LLM's answer: the model's name, and after how many seconds it is given up, where
    there is such a limit. None where nothing is asked of an LLM.
    """
    started = state.started
    if started is None or not started.proposer or state.finished or waiting(state) or not state.told:
        return None
    if not candidates_left(state, config):
        return None
    last = state.prompted[-1] if state.prompted else None
    lost = last is not None and last.reply is None and last.calls > 0
    llm = config.llm
    limit = patience(llm.timeout, 0 if lost else llm.retries) if started.proposer == "openai" else None
    return (last.model if last else llm.model or "the LLM"), limit


def _total(seconds: Mapping[str, float]) -> float:
    return sum(seconds.values())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def votes_at_most(config: Config, candidates: int, origins: Sequence[str], selected: bool) -> int:
    """What a person is asked in a run of so many candidates, at most: on each of them but the first of every set of
    questions, which has nobody to be compared with. Candidates that reply as another did are not asked about again.
    `origins` are the start rows'.
    """
    search, heldout = (sum(t.votes.pairs for t in tasks if t.votes) for tasks in (config.tasks, config.heldout_tasks))
    finalists = finalists_at_most(config.search.finalists, len(config.constraints), origins) if selected else 0
    return search * (candidates - 1 + max(0, finalists - 1)) + heldout * (heldout_rows(origins) - 1)


def votes(state: RunState, config: Config) -> tuple[int, int]:
    """How many a person has given in a run, and how many it will be at most as far as that is known now."""
    given = sum(len(poll.votes) for poll in state.verdicts.polls.values())
    if state.started is None or state.finished or not state.trials:  # before the first nothing is known of the time
        return given, given
    candidates = max(len(state.candidates), len(state.trials) + Spending(config.search.budget, state).evaluations_ahead)
    most = votes_at_most(config, candidates, _origins(state), state.started.selection_items > 0)
    return given, max(given, most)
