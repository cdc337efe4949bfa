"""What a search may spend: evaluations, questions, minutes and the LLMs' cost. Whichever is spent first ends it.

All of it is read off the log, so a replay ends where the run has ended. What is held out in the end is not counted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from llmevo.search.trial import Trial


class Paid(Protocol):
    """Something that costs, as the log has it."""

    @property
    def generation(self) -> int: ...
    @property
    def cost(self) -> float: ...


class Prompted(Paid, Protocol):
    """One call to the LLM."""

    @property
    def seconds(self) -> float: ...


class Judged(Paid, Protocol):
    """What an LLM judge has said."""

    @property
    def questions(self) -> str: ...


class Started(Protocol):
    """The first event of a run."""

    @property
    def items(self) -> int: ...


class Log(Protocol):
    """What the log says so far: `RunState` is one."""

    @property
    def started(self) -> Started | None: ...
    @property
    def finished(self) -> object | None: ...
    @property
    def trials(self) -> Mapping[int, Trial]: ...
    @property
    def prompted(self) -> Sequence[Prompted]: ...
    @property
    def judged(self) -> Sequence[Judged]: ...


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
    def of(cls, state: Log) -> "Spent":
        trials = state.trials.values()
        seconds = sum(_seconds(trial) for trial in trials) + sum(event.seconds for event in state.prompted)
        return cls(
            evaluations=len(trials),
            items=sum(trial.score.items for trial in trials if trial.score),
            seconds=seconds,
            cost=sum(event.cost for event in _paid(state)),
        )


def _seconds(trial: Trial) -> float:
    return sum(trial.seconds.values())


def _paid(state: Log) -> list[Paid]:
    """What the search has paid for: not what was judged after it, of finalists and of what is held out."""
    return [*state.prompted, *(event for event in state.judged if event.questions == "search")]


def _dearest(amounts: Iterable[tuple[int, float]]) -> float:
    """The largest sum of a generation."""
    sums: dict[int, float] = {}
    for generation, amount in amounts:
        sums[generation] = sums.get(generation, 0.0) + amount
    return max(sums.values(), default=0.0)
