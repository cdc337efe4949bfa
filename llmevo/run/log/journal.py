"""One code path for run, resume and replay: each event is read from the log, or made and appended to it."""

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from llmevo.errors import RunError
from llmevo.evaluation.judges.verdicts import VerdictMemory
from llmevo.evaluation.racing import difference
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.versions import NUMERIC, versions
from llmevo.search.trial import Trial

Kind = TypeVar("Kind", bound=events.BaseEvent)

Observer = Callable[[events.Event, RunState], None]
"""Called with every event, old or new, and the state after it."""

ASIDE = (events.Judged, events.Presented, events.Voted, events.Worker, events.Resumed)
"""Events that are written while another one, which takes long, is being made."""

ROUGH = 1e-6
"""The relative tolerance of `sigma` and `trust`, which decide nothing and whose last digits depend on the processor.
Everything else is compared exactly."""

LATER = re.compile(r"candidates\[\d+\]\.expected")
"""Places inside a field that older logs do not have."""


class EndOfRecordError(Exception):
    """A replay reached the end of an unfinished run's log."""


class Journal:
    """The events of a run in their order, recorded ones first."""

    def __init__(
        self,
        recorded: Iterable[events.Event] = (),
        append: Callable[[events.Event], None] | None = None,
        observers: Iterable[Observer] = (),
        verdicts: VerdictMemory | None = None,
    ) -> None:
        """`append` writes a new event; without it the journal ends where the record does (EndOfRecordError).

        `verdicts` is the memory that the judged tasks read; new verdicts are logged before the score they belong to.
        """
        self.state = RunState(verdicts=verdicts or VerdictMemory())
        self.state.verdicts.write = lambda verdict: self.aside(events.said(verdict, len(self.state.told)))
        self._recorded = deque(recorded)
        self._append, self._observers = append, [*observers]
        self._line = 0

    def follow(self, observer: Observer) -> None:
        """Add an observer that is called before all others."""
        self._observers.insert(0, observer)

    def once(self, kind: type[Kind] | tuple[type[Kind], ...], make: Callable[[], Kind]) -> Kind:
        """Return the next event: the recorded one, which must be of this kind, or a new one from `make`.

        A `resumed` event takes effect with the event before it, so it changes the run at the same place each time the
        log is read.
        """
        while self._recorded and isinstance(self._recorded[0], ASIDE):
            self._take(self._recorded.popleft())
        if not self._recorded:
            if self._append is None:
                raise EndOfRecordError
            event = make()
            self._append(event)  # pyright: ignore[reportArgumentType]
        else:
            event = self._recorded.popleft()
            if not isinstance(event, kind):
                raise self.broken(f"is the event {event.event!r} where this config makes another", ahead=True)
        self._take(event)
        while self._recorded and isinstance(self._recorded[0], events.Resumed):
            self._take(self._recorded.popleft())
        return event

    @property
    def recorded_next(self) -> type[events.BaseEvent] | None:
        """The kind of the next recorded event, those of ASIDE left out; None where the next one is new."""
        return next((type(event) for event in self._recorded if not isinstance(event, ASIDE)), None)

    @property
    def ahead(self) -> bool:
        """Whether all recorded events were read and the next one is new."""
        return self._append is not None and not self._recorded

    def aside(self, event: events.Event) -> None:
        """Append an event while another one is being made; it stands before that one."""
        if self._append is None:
            raise EndOfRecordError
        self._append(event)
        self._take(event)

    def _take(self, event: Any) -> None:
        self._line += 1
        self.state.apply(event)
        for observer in self._observers:
            observer(event, self.state)

    def recomputed(self, made: Kind) -> Kind:
        """Take an event that follows from those before it. Raises RunError when the recorded one differs."""
        if self._recorded and (difference := next(_differences(self._recorded[0], made), None)):
            raise self.broken(difference, ahead=True)
        return self.once(type(made), lambda: made)

    def expect(self, event: Kind, **fields: Any) -> Kind:
        """Check fields of the event just taken. Raises RunError."""
        for name, value in fields.items():
            if getattr(event, name) != value:
                raise self.broken(f"{_named(event, name, getattr(event, name), value)}")
        return event

    def broken(self, what: str, ahead: bool = False) -> RunError:
        """Return the error that names the line where the log does not follow from its config; `ahead`: the next one."""
        others = _others(self.state)
        return RunError(f"the log does not follow from its config: line {self._line + ahead}: {what}{others}")


def _others(state: RunState) -> str:
    """Name the versions that differ between the log and this machine."""
    here, logged = versions(), state.started.versions if state.started else {}
    names = [name for name in ("llmevo", "search", "machine", "blas", "python", *NUMERIC) if name in logged]
    others = [f"{name} {logged[name]} (here {here[name]})" for name in names if logged[name] != here[name]]
    return f". It was made with {', '.join(others)}, which may compute others: try it with those" if others else ""


def _differences(recorded: events.BaseEvent, made: events.BaseEvent) -> Iterator[str]:
    """Yield the fields in which two events differ, but for the time."""
    old, new = (event.model_dump(mode="json", exclude={"time"}) for event in (recorded, made))
    if old["event"] != new["event"]:
        yield f"is the event {old['event']!r} where {new['event']!r} follows"
        return
    for name in new:
        if name in recorded.model_fields_set:  # older logs lack newer fields
            for place, before, now in _unequal(name, old[name], new[name]):
                yield _named(made, place, before, now)


def _unequal(place: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the innermost places where two values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            inner = f"{place}.{key}"
            if key in old or not LATER.fullmatch(inner):
                yield from _unequal(inner, old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, pair in enumerate(zip(old, new, strict=True)):
            yield from _unequal(f"{place}[{number}]", *pair)
    elif old != new and not (place in ("sigma", "trust") and _near(old, new)):
        yield place, old, new


def _near(old: Any, new: Any) -> bool:
    numbers = isinstance(old, float | int) and isinstance(new, float | int)
    return numbers and abs(old - new) <= ROUGH * max(abs(old), abs(new), ROUGH)


def _named(event: events.BaseEvent, place: str, before: Any, now: Any) -> str:
    return f"{getattr(event, 'event', '')}.{place} is {_short(before)} in the log and {_short(now)} recomputed"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"


def check_score(
    journal: Journal, event: events.Evaluated, rival: Trial | None, counted: Mapping[str, tuple[float, str]]
) -> None:
    """Raise RunError unless a score follows from its tasks, or for a stopped candidate from its rival's score and the
    difference on the questions that both were asked.
    """
    if event.rival is None:
        check_sum(journal, event, counted)
        return
    journal.expect(event, rival=rival.candidate.id if rival else None)
    assert rival
    assert rival.score
    weights = {task: weight for task, (weight, _) in counted.items()}
    journal.expect(
        event, score=rival.score.total + difference(event.item_scores, rival.score.item_scores, weights).mean
    )


def check_sum(journal: Journal, event: events.Scored, counted: Mapping[str, tuple[float, str]]) -> None:
    """Raise RunError unless a score is the weighted sum of its tasks' metrics."""
    total = 0.0
    for task, (weight, metric) in counted.items():
        verdicts = journal.state.verdicts
        standing = verdicts.standing(task) if task in verdicts.latest and not event.cached else None
        if standing is not None and event.tasks[task][metric] != standing:
            raise journal.broken(f"{task} is {event.tasks[task][metric]} in the log and {standing} by its votes")
        total += weight * event.tasks.get(task, {}).get(metric, math.nan)
    if math.isfinite(total):
        journal.expect(event, score=total)
