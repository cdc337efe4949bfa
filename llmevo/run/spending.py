"""The budget of a search: evaluations, questions, minutes and the LLMs' cost. The first one that is spent ends it.

Everything follows from the log, so a replay ends where the run ended. Finals and held-out rows are not counted.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from llmevo.config import Budget, amount_in_words
from llmevo.run.log.events import Judged, Prompted
from llmevo.run.log.state import RunState
from llmevo.search.trial import Trial


@dataclass(frozen=True)
class Spending:
    """The budget of a run against its log."""

    budget: Budget
    state: RunState

    @property
    def spent(self) -> dict[str, float]:
        """The amount of every kind."""
        trials, started = _trials(self.state), self.state.started
        seconds = sum(map(_seconds, trials)) + sum(event.seconds for event in self.state.prompted)
        if started and started.order:
            seconds = self.state.busy
        return {
            "evaluations": len(trials),
            "items": sum(trial.score.items for trial in trials if trial.score),
            "seconds": seconds,
            "minutes": seconds / 60,
            "cost": sum(event.cost for event in _paid(self.state)),
        }

    @property
    def left(self) -> dict[str, float]:
        """The rest of every bounded kind; below 0 where the start rows alone took more."""
        spent = self.spent
        return {kind: bound - spent[kind] for kind, bound in self._bounds.items()}

    def next_size(self, wanted: int) -> int:
        """Return the size of the next generation, 0 at the end of the search: at most `wanted`, and as many as fit if
        each takes as long as the slowest of the last `wanted`, and the LLM as much as in its most expensive generation.
        Candidates that are being scored count as scored in full.
        """
        state, left = self.state, self.left
        pending = max(0, len(state.candidates) - len(state.trials))
        sizes: list[float] = [wanted, left["evaluations"] - pending]
        if "items" in left and state.started:
            sizes.append(left["items"] // state.started.items - pending)
        if self.budget.minutes is not None:
            slowest = max((_seconds(trial) - self._once(trial) for trial in _trials(state)[-wanted:]), default=0.0)
            asking = _largest_generation((event.generation, event.seconds) for event in state.prompted)
            seconds = self.budget.minutes * 60 - self.spent["seconds"] - asking
            at_once = state.started.workers if state.started else 1
            sizes.append(at_once * (seconds // slowest) - pending if slowest else wanted * (seconds > 0))
        if "cost" in left and state.rules > 4:
            asking = _largest_generation((event.generation, event.cost) for event in state.prompted)
            judging, room = self._judging, left["cost"] - asking
            fits = left["cost"] > 0 and room >= 0
            sizes.append(room / judging + 1e-9 - pending if fits and judging else wanted * fits)
        elif "cost" in left:
            largest = _largest_generation((event.generation, event.cost) for event in _paid(state))
            sizes.append(wanted * (left["cost"] > 0 and left["cost"] >= largest))
        return max(0, int(min(sizes)))

    def _once(self, trial: Trial) -> float:
        """The seconds of a preparation, which is made for all candidates once; in logs with `rules` below 5 none."""
        return trial.seconds.get("prepare", 0.0) if self.state.rules > 4 else 0.0

    @property
    def _judging(self) -> float:
        """What judges took for a candidate, in the most expensive generation."""
        sizes = Counter(trial.candidate.generation for trial in self.state.trials.values())
        costs = _by_generation((event.generation, event.cost) for event in _judged(self.state))
        return max((cost / sizes[number] for number, cost in costs.items() if sizes[number]), default=0.0)

    @property
    def evaluations_ahead(self) -> int:
        """A forecast of the evaluations still to come, at the average spending so far."""
        if self.state.finished:
            return 0
        spent = self.spent
        each = {"evaluations": 1.0, "items": self.state.started.items if self.state.started else 0}
        if spent["evaluations"]:  # racing leaves questions out
            each |= {kind: spent[kind] / spent["evaluations"] for kind in ("items", "minutes", "cost")}
            each["minutes"] -= sum(map(self._once, _trials(self.state))) / 60 / spent["evaluations"]
        return max(0, int(min(amount / each[kind] for kind, amount in self.left.items() if each.get(kind))))

    @property
    def progress(self) -> float:
        """The share, 0 to 1, that is spent of the kind that is nearest its end."""
        if self.state.finished:
            return 1.0
        spent = self.spent
        return min(1.0, max(spent[kind] / bound for kind, bound in self._bounds.items()))

    def __str__(self) -> str:
        """The spent amounts: `12 of 100 evaluations, 3.2 of 60 min`."""
        spent, bounds = self.spent, self.budget.bounds
        parts = [] if "evaluations" in bounds else [f"{spent['evaluations']:,} evaluations"]
        return ", ".join([*parts, *(amount_in_words(kind, bound, spent[kind]) for kind, bound in bounds.items())])

    @property
    def _bounds(self) -> dict[str, float]:
        return {"evaluations": self.budget.evaluations, **self.budget.bounds}


def _trials(state: RunState) -> list[Trial]:
    """The candidates in their order, as the search scored them; in logs with `rules` below 4 as the finals did."""
    trials = state.searched if state.rules > 3 else state.trials
    return [trials[number] for number in state.trials]


def _seconds(trial: Trial) -> float:
    return sum(trial.seconds.values())


def _paid(state: RunState) -> list[Prompted | Judged]:
    """Prompts and judgements of the search, without those of finalists and held-out rows."""
    return [*state.prompted, *_judged(state)]


def _judged(state: RunState) -> list[Judged]:
    return [event for event in state.judged if event.questions == "search"]


def _largest_generation(amounts: Iterable[tuple[int, float]]) -> float:
    """The largest sum of a generation."""
    return max(_by_generation(amounts).values(), default=0.0)


def _by_generation(amounts: Iterable[tuple[int, float]]) -> dict[int, float]:
    """The sum of each generation."""
    sums: dict[int, float] = {}
    for generation, amount in amounts:
        sums[generation] = sums.get(generation, 0.0) + amount
    return sums
