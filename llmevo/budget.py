"""What a search may spend: evaluations, questions, minutes and the LLMs' cost. Whichever is spent first ends it.

All of it is read off the log, so a replay ends where the run has ended. What is held out in the end is not counted.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from llmevo.errors import ConfigError
from llmevo.plurals import plural
from llmevo.trial import Trial

MANY = 1000
"""Evaluations at most where only another kind is bounded: what optimizers plan with then."""

UNITS = {
    "evaluations": ("", "evaluation", "evaluations", "evals"),
    "items": ("item", "items", "question", "questions"),
    "minutes": ("m", "min", "minute", "minutes"),
    "hours": ("h", "hour", "hours"),
    "cost": ("$", "cost"),
}
AMOUNT = re.compile(r"(\$?)\s*(\d[\d_,]*\.?\d*|\.\d+)\s*([a-z]*)")
FORMS = "give a number of evaluations, or amounts with units such as `100, 50000 items, 60 min, 1.5 h, $5`"


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


class Budget(BaseModel):
    """The bounds of a search. In a config a number (of evaluations), a mapping, or amounts with units as text."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    evaluations: int = Field(default=MANY, ge=1)
    """Candidates to score, the start rows included; 1000 where only other kinds are given."""
    items: int | None = Field(default=None, ge=1)
    """Questions to answer while searching."""
    minutes: float | None = Field(default=None, gt=0)
    """Of merging, scoring and asking the LLM, as the log has them; pauses and loading do not count."""
    cost: float | None = Field(default=None, gt=0)
    """Of the LLM, in the units of `llm.price`, and of judges, in those of `judge.price`."""

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        if isinstance(value, bool) or value is None or value == {}:
            raise ValueError(FORMS)
        if isinstance(value, int | float):
            return {"evaluations": value}
        return _amounts(value) if isinstance(value, str) else value

    @model_serializer
    def _written(self) -> int | dict[str, float]:
        others = {kind: value for kind in ("items", "minutes", "cost") if (value := getattr(self, kind)) is not None}
        return {"evaluations": self.evaluations, **others} if others else self.evaluations

    @property
    def bounds(self) -> dict[str, float]:
        """The kinds that are bounded, without the evaluations that nobody has bounded."""
        written: Any = self._written()
        given: dict[str, float] = written if isinstance(written, dict) else {"evaluations": written}
        return {
            kind: value for kind, value in given.items() if len(given) == 1 or (kind, value) != ("evaluations", MANY)
        }

    def spent(self, state: Log) -> Spent:
        """What the log says that the search has spent."""
        return Spent.of(state)

    def left(self, state: Log) -> dict[str, float]:
        """What is left of every bounded kind; below 0 where the start rows alone took more."""
        spent = Spent.of(state)
        bounds = {"evaluations": self.evaluations, **self.bounds}
        return {kind: bound - getattr(spent, kind) for kind, bound in bounds.items()}

    def size(self, state: Log, wanted: int) -> int:
        """Candidates of the next generation: at most `wanted`, and as many as fit if each takes as long as the slowest
        of as many before it, and the LLM as much as in its dearest generation. 0 ends the search.
        """
        left, spent = self.left(state), Spent.of(state)
        sizes: list[float] = [wanted, left["evaluations"]]
        if "items" in left and state.started:
            sizes.append(left["items"] // state.started.items)
        if self.minutes is not None:
            slowest = max((_seconds(trial) for trial in [*state.trials.values()][-wanted:]), default=0.0)
            asking = _dearest((event.generation, event.seconds) for event in state.prompted)
            seconds = self.minutes * 60 - spent.seconds - asking
            sizes.append(seconds // slowest if slowest else wanted * (seconds > 0))
        if "cost" in left:
            dearest = _dearest((event.generation, event.cost) for event in _paid(state))
            sizes.append(wanted * (left["cost"] > 0 and left["cost"] >= dearest))
        return max(0, int(min(sizes)))

    def ahead(self, state: Log) -> int:
        """Evaluations still to come, if they go on taking what they took on average. For forecasts."""
        if state.finished:
            return 0
        spent, left = Spent.of(state), self.left(state)
        items = state.started.items if state.started else 0
        each = {"evaluations": 1.0, "items": items}
        if spent.evaluations:
            each |= {kind: getattr(spent, kind) / spent.evaluations for kind in ("minutes", "cost")}
        return max(0, int(min(amount / each[kind] for kind, amount in left.items() if each.get(kind))))

    def evaluations_of(self, items: int) -> int:
        """Evaluations to plan with before anything is scored, when each answers so many questions."""
        return self.evaluations if self.items is None else min(self.evaluations, self.items // max(1, items))

    def progress(self, state: Log) -> float:
        """The share that is done, 0 to 1, of the kind that is nearest its end."""
        if state.finished:
            return 1.0
        spent = Spent.of(state)
        bounds = {"evaluations": self.evaluations, **self.bounds}
        return min(1.0, max(getattr(spent, kind) / bound for kind, bound in bounds.items()))

    def words(self, state: Log) -> str:
        """What is spent of what: `12 of 100 evaluations, 3.2 of 60 min`."""
        spent, bounds = Spent.of(state), self.bounds
        parts = [] if "evaluations" in bounds else [plural(spent.evaluations, "evaluation")]
        return ", ".join([*parts, *(_shown(kind, bound, getattr(spent, kind)) for kind, bound in bounds.items())])

    def __str__(self) -> str:
        return ", ".join(_shown(kind, bound) for kind, bound in self.bounds.items())


def parse_budget(*texts: str) -> Budget:
    """The budget that `--budget` means: `100`, `50000 items`, `100, 1.5 h, $5`; of several, the last of each kind.

    Raises ConfigError that names the value and the way out.
    """
    bounds: dict[str, float] = {}
    for text in texts:
        try:
            bounds |= Budget.model_validate(text).bounds
        except ValueError as error:
            errors: Any = getattr(error, "errors", None)  # of pydantic's, the first one's own words
            reason = errors()[0]["msg"].removeprefix("Value error, ") if errors else str(error)
            named = "" if repr(text) in reason else f" (it is {text!r})"
            raise ConfigError(f"--budget: {reason}{named}") from None
    return Budget.model_validate(bounds)


def _amounts(text: str) -> dict[str, float]:
    """Amounts with units, separated by commas. Raises ValueError."""
    found: dict[str, float] = {}
    for part in re.split(r",(?!\d{3}(?!\d))", text.lower()):  # 50,000 is one number; 100, 500 are two
        match = AMOUNT.fullmatch(part.strip())
        unit = match and (match[1] or match[3])
        kind = next((kind for kind, units in UNITS.items() if unit in units), None)
        if match is None or kind is None or (match[1] and match[3]):
            raise ValueError(f"{part.strip()!r} is no amount; {FORMS}")
        value = float(match[2].replace(",", ""))
        kind, value = ("minutes", value * 60) if kind == "hours" else (kind, value)
        if kind in found:
            raise ValueError(f"{text!r} gives {kind} twice; {FORMS}")
        found[kind] = value
    return found


def _shown(kind: str, bound: float, spent: float | None = None) -> str:
    whole = f"{bound:,.0f}" if bound == int(bound) else f"{bound:g}"
    of = "" if spent is None else f"{spent:,} of " if isinstance(spent, int) else f"{spent:.3g} of "
    named = "min" if kind == "minutes" else kind.removesuffix("s") if bound == 1 else kind
    return f"{of}{whole} {named}"


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
