"""A run's events, sent on to loggers. Whatever becomes of a logger, the run goes on."""

import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

from llmevo.merging.recipe import Recipe
from llmevo.run.log import events
from llmevo.run.log.journal import Observer
from llmevo.run.log.state import RunState
from llmevo.run.trackers import LOGGERS
from llmevo.run.trackers.base import About, Logger, cleaned

SIZE = 1000
"""Messages that wait for a logger at most."""


PATIENCE = 30.0
"""Seconds that a run waits for a logger, in all: while too many messages wait, and in the end."""


SHOWN = ("genome", "tasks", "heldout", "limit", "search")
"""Sections of a config that are sent; others may name files, servers and what opens them."""


Message = Callable[[Logger], None]


@contextmanager
def forwarded(
    loggers: Sequence[Mapping[str, Any]], folder: Path, warn: Callable[[str], None], patience: float = PATIENCE
) -> Generator[list[Observer]]:
    """Observers for a journal that send its events to these loggers.

    One that fails or hangs is off from then on, after one `warn`. `patience`: seconds that it may cost the run in all.
    """
    with ExitStack() as stack:
        senders = [TrackerThread(options, folder, warn, patience) for options in loggers]
        for sender in senders:
            stack.callback(sender.close)
        yield [sender.observe for sender in senders]


class TrackerThread:
    """Hands the events of a run to one logger, which lives in a thread of its own."""

    def __init__(
        self, options: Mapping[str, Any], folder: Path, warn: Callable[[str], None], patience: float = PATIENCE
    ) -> None:
        self.name, self.folder, self._warn = options["name"], folder, warn
        self._options = {key: value for key, value in options.items() if key != "name"}
        self._queue: Queue[tuple[int, Message] | None] = Queue(SIZE)
        self._thread: threading.Thread | None = None
        self._patience, self._off, self._finished = patience, False, False
        self._count = 0
        self._best: tuple[int, str] | None = None

    def observe(self, event: events.Event, state: RunState) -> None:
        """Take in one event."""
        if self._off:
            return
        self._count += 1
        if isinstance(event, events.RunStarted):
            about = about_run(event, self.folder)
            self._thread = threading.Thread(target=self._work, args=(about,), name=self.name, daemon=True)
            self._thread.start()
        self._finished = isinstance(event, events.RunFinished)
        for message in self._messages(event, state):
            self._put((self._count, message))

    def _messages(self, event: events.Event, state: RunState) -> Iterator[Message]:
        step, count = len(state.trials), self._count
        values, texts, files = {**numbers(event, state)}, {**written(event)}, dict[str, str]()
        leader = state.leader if isinstance(event, events.Evaluated) else None
        if leader and (leader.candidate.id, leader.reason) != self._best:  # the last of the start rows may tell another
            self._best = leader.candidate.id, leader.reason
            candidate = leader.candidate
            said = f"#{candidate.id} from {candidate.origin}: {leader.value:.4f} {candidate.note} {leader.reason}"
            texts["best"] = " ".join(said.split())
            files["best.yml"] = Recipe.model_validate(state.recipes[candidate.id]).to_yaml()
        if leader:
            values["best"] = leader.value
        values = {cleaned(name): float(value) for name, value in values.items()}
        for name, text in texts.items():
            yield lambda logger, n=name, t=text: logger.text(n, t, step)
        for name, text in files.items():
            yield lambda logger, n=name, t=text: logger.file(n, t, step)
        yield lambda logger: logger.numbers({**values, "events": count}, step)

    def _put(self, message: tuple[int, Message] | None) -> None:
        started = time.monotonic()
        try:
            self._queue.put(message, timeout=max(0.0, self._patience))
        except Full:
            self._fail("it does not keep up")
        self._patience -= time.monotonic() - started

    def _work(self, about: About) -> None:
        """The thread: everything that touches the logger."""
        try:
            logger = LOGGERS[self.name](about, **self._options)
            while (message := self._queue.get()) is not None:
                if self._off:
                    return
                if message[0] > logger.events:
                    message[1](logger)
            logger.close(self._finished)
        except BaseException as error:  # also what calls sys.exit: nothing of a logger's may reach the run
            self._fail(f"{type(error).__name__}: {error}".splitlines()[0])

    def _fail(self, reason: str) -> None:
        if self._off:
            return
        self._off = True
        while True:  # nobody waits for room any more
            try:
                self._queue.get_nowait()
            except Empty:
                break
        self._warn(f"The logger {self.name} is off, the run goes on without it: {reason}")

    def close(self) -> None:
        """Wait until everything is sent, as long as there is patience left."""
        if self._thread is None or self._off:
            return
        self._put(None)
        self._thread.join(max(0.0, self._patience))
        if self._thread.is_alive():
            self._fail("it has not sent everything in time")


def about_run(started: events.RunStarted, folder: Path) -> About:
    """What a logger is told of a run when it is opened."""
    config = {key: started.config[key] for key in SHOWN if key in started.config}
    flat = dict(_flat(config)) | {"seed": started.seed, "questions": started.items, "genes": len(started.genes)}
    flat |= {f"versions.{name}": number for name, number in started.versions.items()}
    if started.proposer:
        flat["proposer"] = started.proposer
    name = folder.absolute().name
    number = re.sub(r"\D", "", started.time)[:17]
    return About(re.sub(r"[^\w-]", "-", f"{name}-{number}"), name, folder, flat)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, inner if isinstance(inner, str | int | float | bool) else str(inner)


def numbers(event: events.Event, state: RunState) -> Mapping[str, float]:
    """What an event says in numbers."""
    match event:
        case events.Evaluated():
            genes = {f"genes/{name}": value for name, value in state.candidates[event.candidate].genes.items()}
            seconds = {f"seconds/{name}": value for name, value in event.seconds.items()}
            return {"score": event.score, "stderr": event.stderr, **_metrics("tasks", event), **genes, **seconds}
        case events.Failed():
            return {"failures": sum(trial.score is None for trial in state.trials.values())}
        case events.Told():
            told = {"generation": event.generation, "step_size": event.sigma, "trust": event.trust}
            return {name: value for name, value in told.items() if value is not None}
        case events.Prompted():
            tokens = {f"llm/{name}_tokens": count for name, count in event.tokens.items()}
            return {"llm/proposals": event.used, "llm/seconds": event.seconds, "llm/cost": event.cost, **tokens}
        case events.HeldOut():
            row = f"heldout/{event.row}"
            return {f"{row}/score": event.score, f"{row}/stderr": event.stderr, **_metrics(row, event)}
        case _:
            return {}


def _metrics(prefix: str, event: events.Scored) -> Mapping[str, float]:
    """The metrics of every task, without their standard errors."""
    return {
        f"{prefix}/{task}/{metric.removesuffix(',none')}": value
        for task, metrics in event.tasks.items()
        for metric, value in metrics.items()
        if "_stderr" not in metric and metric != "sample_len"
    }


def written(event: events.Event) -> Mapping[str, str]:
    """What an event says in words."""
    match event:
        case events.Prompted():
            thought = "\n".join([event.analysis, *event.problems]).strip()
            return {"llm/thought": thought} if thought else {}
        case events.Failed():
            return {"failure": f"#{event.candidate}: {event.reason}"}
        case _:
            return {}
