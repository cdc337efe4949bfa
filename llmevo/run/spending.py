"""What a search may spend: evaluations, questions, minutes and the LLMs' cost. Whichever is spent first ends it.

All of it is read off the log, so a replay ends where the run has ended. What is held out in the end is not counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from llmevo.config import Budget, amount_in_words
from llmevo.run.log.events import Judged, Prompted
from llmevo.run.log.state import RunState
from llmevo.search.trial import Trial


@dataclass(frozen=True)
class Spent:
    """What a search has spent."""

    evaluations: int
    items: int
    seconds: float
    cost: float

    @property
    def minutes(self) -> float:
        return self.seconds / 60

    @classmethod
    def of(cls, state: RunState) -> "Spent":
        trials = state.trials.values()
        seconds = sum(_seconds(trial) for trial in trials) + sum(event.seconds for event in state.prompted)
        return cls(
            evaluations=len(trials),
            items=sum(trial.score.items for trial in trials if trial.score),
            seconds=seconds,
            cost=sum(event.cost for event in _paid(state)),
        )


@dataclass(frozen=True)
class Spending:
    """What a run has spent of its budget, and what is left. Everything is read off the log."""

    budget: Budget
    state: RunState

    @property
    def left(self) -> dict[str, float]:
        """What is left of every bounded kind; below 0 where the start rows alone took more."""
        spent = Spent.of(self.state)
        return {kind: bound - getattr(spent, kind) for kind, bound in self._bounds.items()}

    def next_size(self, wanted: int) -> int:
        """Candidates of the next generation: at most `wanted`, and as many as fit if each takes as long as the slowest
        of as many before it, and the LLM as much as in its most expensive generation. 0 ends the search.
        """
        state, left, spent = self.state, self.left, Spent.of(self.state)
        sizes: list[float] = [wanted, left["evaluations"]]
        if "items" in left and state.started:
            sizes.append(left["items"] // state.started.items)
        if self.budget.minutes is not None:
            slowest = max((_seconds(trial) for trial in [*state.trials.values()][-wanted:]), default=0.0)
            asking = _largest_generation((event.generation, event.seconds) for event in state.prompted)
            seconds = self.budget.minutes * 60 - spent.seconds - asking
            sizes.append(seconds // slowest if slowest else wanted * (seconds > 0))
        if "cost" in left:
            largest = _largest_generation((event.generation, event.cost) for event in _paid(state))
            sizes.append(wanted * (left["cost"] > 0 and left["cost"] >= largest))
        return max(0, int(min(sizes)))

    @property
    def evaluations_ahead(self) -> int:
        """Evaluations still to come, if they go on taking what they took on average. For forecasts."""
        if self.state.finished:
            return 0
        spent = Spent.of(self.state)
        items = self.state.started.items if self.state.started else 0
        each = {"evaluations": 1.0, "items": items}
        if spent.evaluations:
            each |= {kind: getattr(spent, kind) / spent.evaluations for kind in ("minutes", "cost")}
        return max(0, int(min(amount / each[kind] for kind, amount in self.left.items() if each.get(kind))))

    @property
    def progress(self) -> float:
        """The share that is done, 0 to 1, of the kind that is nearest its end."""
        if self.state.finished:
            return 1.0
        spent = Spent.of(self.state)
        return min(1.0, max(getattr(spent, kind) / bound for kind, bound in self._bounds.items()))

    def __str__(self) -> str:
        """What is spent of what: `12 of 100 evaluations, 3.2 of 60 min`."""
        spent, bounds = Spent.of(self.state), self.budget.bounds
        parts = [] if "evaluations" in bounds else [f"{spent.evaluations:,} evaluations"]
        return ", ".join(
            [*parts, *(amount_in_words(kind, bound, getattr(spent, kind)) for kind, bound in bounds.items())]
        )

    @property
    def _bounds(self) -> dict[str, float]:
        return {"evaluations": self.budget.evaluations, **self.budget.bounds}


def _seconds(trial: Trial) -> float:
    return sum(trial.seconds.values())


def _paid(state: RunState) -> list[Prompted | Judged]:
    """What the search has paid for: not what was judged after it, of finalists and of what is held out."""
    return [*state.prompted, *(event for event in state.judged if event.questions == "search")]


def _largest_generation(amounts: Iterable[tuple[int, float]]) -> float:
    """The largest sum of a generation."""
    sums: dict[int, float] = {}
    for generation, amount in amounts:
        sums[generation] = sums.get(generation, 0.0) + amount
    return max(sums.values(), default=0.0)
