"""One code path for run, resume and replay: each event is taken from the log, or made and appended to it."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

from llmevo import events
from llmevo.errors import RunError
from llmevo.runlog import RunState

Kind = TypeVar("Kind", bound=events.BaseEvent)

Observer = Callable[[events.Event, RunState], None]
"""Shown every event, old or new, with the state after it."""


class EndOfRecordError(Exception):
    """A replay has come to the end of an unfinished run's log."""


class Journal:
    """The events of a run in their order, past ones first."""

    def __init__(
        self,
        recorded: Iterable[events.Event] = (),
        append: Callable[[events.Event], None] | None = None,
        observers: Iterable[Observer] = (),
    ) -> None:
        """`append` writes a new event; without it the journal ends where the record does (EndOfRecordError)."""
        self.state = RunState()
        self._recorded = deque(recorded)
        self._append, self._observers = append, [*observers]

    @property
    def replaying(self) -> bool:
        return bool(self._recorded)

    def once(self, kind: type[Kind] | tuple[type[Kind], ...], make: Callable[[], Kind]) -> Kind:
        """The next event, which must be of this kind: recorded if it happened before, made now if not."""
        if not self._recorded:
            if self._append is None:
                raise EndOfRecordError
            event = make()
            self._append(event)  # pyright: ignore[reportArgumentType]
        else:
            event = self._recorded.popleft()
            if not isinstance(event, kind):
                raise RunError(
                    f"the log has the event {event.event!r} where this config makes another; was it changed?"
                )
        self.state.apply(event)  # pyright: ignore[reportArgumentType]
        for observer in self._observers:
            observer(event, self.state)  # pyright: ignore[reportArgumentType]
        return event

    def recomputed(self, made: Kind) -> Kind:
        """An event that follows from those before it: if it is recorded, it must be the same."""
        if self._recorded and (difference := _difference(self._recorded[0], made)):
            raise RunError(f"the log does not follow from its config: {difference}")
        return self.once(type(made), lambda: made)


def _difference(recorded: events.BaseEvent, made: events.BaseEvent) -> str | None:
    """The first field in which two events differ, apart from when they were written."""
    old, new = (event.model_dump(mode="json", exclude={"time"}) for event in (recorded, made))
    for name in recorded.model_fields_set & new.keys():  # what later versions write too is missing in older logs
        if old.get(name) != new[name]:
            return f"{new['event']}.{name} is {_short(old.get(name))} in the log and {_short(new[name])} recomputed"
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"
