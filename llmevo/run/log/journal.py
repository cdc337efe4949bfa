"""One code path for run, resume and replay: each event is taken from the log, or made and appended to it."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from llmevo.errors import RunError
from llmevo.evaluation.judges.memory import VerdictMemory
from llmevo.evaluation.racing import difference
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.versions import NUMERIC, versions
from llmevo.search.trial import Trial

Kind = TypeVar("Kind", bound=events.BaseEvent)


Observer = Callable[[events.Event, RunState], None]
"""Shown every event, old or new, with the state after it."""


ASIDE = (events.Judged, events.Presented, events.Voted, events.Resumed)
"""What may stand before an event that takes long to make."""


ROUGH = 1e-6
"""How far numbers may be off that nothing is decided by: `sigma` and `trust`, as a share. Their last digits are the
processor's. Everything else is compared exactly."""


class EndOfRecordError(Exception):
    """A replay has come to the end of an unfinished run's log."""


class Journal:
    """The events of a run in their order, past ones first."""

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
        """Show it every event from now on, before all others."""
        self._observers.insert(0, observer)

    def once(self, kind: type[Kind] | tuple[type[Kind], ...], make: Callable[[], Kind]) -> Kind:
        """The next event, which must be of this kind: recorded if it happened before, made now if not.

        A `resumed` event takes effect with the event before it: so what it changes, it changes at the same place each
        time the log is read.
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
    def ahead(self) -> bool:
        """Whether everything recorded has been read and what comes next is made."""
        return self._append is not None and not self._recorded

    def aside(self, event: events.Event) -> None:
        """Append what happens while another event is being made: it stands before that one."""
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
        """An event that follows from those before it: if it is recorded, it must be the same."""
        if self._recorded and (difference := next(_differences(self._recorded[0], made), None)):
            raise self.broken(difference, ahead=True)
        return self.once(type(made), lambda: made)

    def expect(self, event: Kind, **fields: Any) -> Kind:
        """The event just taken, if these of its fields are what they should be. Raises RunError."""
        for name, value in fields.items():
            if getattr(event, name) != value:
                raise self.broken(f"{_named(event, name, getattr(event, name), value)}")
        return event

    def broken(self, what: str, ahead: bool = False) -> RunError:
        """The error that says at which line the log is not what follows from its config; `ahead`: at the next one."""
        others = _others(self.state)
        return RunError(f"the log does not follow from its config: line {self._line + ahead}: {what}{others}")


def _others(state: RunState) -> str:
    """What the log was made with that is another here."""
    here, logged = versions(), state.started.versions if state.started else {}
    names = [name for name in ("llmevo", "search", "machine", "blas", "python", *NUMERIC) if name in logged]
    others = [f"{name} {logged[name]} (here {here[name]})" for name in names if logged[name] != here[name]]
    return f". It was made with {', '.join(others)}, which may compute others: try it with those" if others else ""


def _differences(recorded: events.BaseEvent, made: events.BaseEvent) -> Iterator[str]:
    """The fields in which two events differ, apart from when they were written."""
    old, new = (event.model_dump(mode="json", exclude={"time"}) for event in (recorded, made))
    if old["event"] != new["event"]:
        yield f"is the event {old['event']!r} where {new['event']!r} follows"
        return
    for name in new:
        if name in recorded.model_fields_set:  # what later versions write too is missing in older logs
            for place, before, now in _unequal(name, old[name], new[name]):
                yield _named(made, place, before, now)


def _unequal(place: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """The innermost places where two values differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            yield from _unequal(f"{place}.{key}", old.get(key), new.get(key))
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
    """Of a candidate that was stopped, the rival's score and the difference on what both were asked."""
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
    """A score is the weighted sum of its tasks' metrics: see `weigh`."""
    total = 0.0
    for task, (weight, metric) in counted.items():
        standing = None if event.cached else journal.state.verdicts.standing(task)
        if standing is not None and event.tasks[task][metric] != standing:
            raise journal.broken(f"{task} is {event.tasks[task][metric]} in the log and {standing} by its votes")
        total += weight * event.tasks.get(task, {}).get(metric, math.nan)
    if math.isfinite(total):
        journal.expect(event, score=total)
