"""A comparison: one run for every optimizer and seed, on one scorer, so that a score is computed once for all.

With several workers as many runs go on at the same time. Each is asked for one candidate after the other, as with one
worker, so their results do not depend on the number of workers.
"""

import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llmevo.config import Config, parse_logged
from llmevo.errors import ConfigError, LlmevoError, RunError, nearest
from llmevo.llm.client import Client, Reply, Request
from llmevo.run import loop, trust
from llmevo.run.experiment import Experiment
from llmevo.run.log import changes, events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, RunLog, Tail, read_log
from llmevo.run.resume import changed_facts, refused
from llmevo.search.paths.registry import every

if TYPE_CHECKING:  # see `Experiment`
    from llmevo.run.scorer import Scorer


@dataclass(frozen=True)
class ComparedRun:
    """One optimizer with one seed; `out` is the comparison's folder."""

    optimizer: str
    seed: int
    out: Path

    @property
    def name(self) -> str:
        return f"{self.optimizer}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / f"{self.optimizer}-{self.seed}"


UNFAIR = {
    "minutes": "minutes do not compare runs, for a score that one run has costs the others no time; give evaluations or"
    " items",
    "cost": "only some optimizers have a cost, so their runs would end at different evaluations; give evaluations or"
    " items, and llm.max_cost (--max-cost) for the LLM, after which a run goes on without it",
}
"""Why a kind of budget is none for a comparison, and the way out."""

PATIENCE = 5.0
"""Seconds in which the other runs of a comparison may end when it is stopped; one that waits for an LLM takes longer,
and is left behind."""

Watch = Callable[[ComparedRun, events.Event, RunState], None]
"""Called with every event of every run."""


@dataclass(frozen=True)
class ComparisonRuns:
    """The runs of a comparison, seed by seed, so that stopping early leaves complete seeds."""

    config: Config
    text: str
    """The config file."""
    root: Path
    out: Path
    optimizers: Sequence[str]
    seeds: int
    api_key: str | None = None
    trusted: bool = False
    """Whether logs from elsewhere are trusted: see `llmevo.run.trust`."""

    @property
    def entries(self) -> list[ComparedRun]:
        """The runs in their order."""
        first = self.config.search.seed
        return [
            ComparedRun(optimizer, seed, self.out)
            for seed in range(first, first + self.seeds)
            for optimizer in self.optimizers
        ]

    def whole(self, finished: Collection[ComparedRun]) -> list[ComparedRun]:
        """Return the finished runs of the seeds on which all runs are finished, in their order."""
        open_seeds = {entry.seed for entry in self.entries if entry not in finished}
        return [entry for entry in self.entries if entry.seed not in open_seeds]

    @cached_property
    def scorer(self) -> "Scorer":
        """The scorer of all runs."""
        from llmevo.run.scorer import Scorer

        return Scorer(self.config_of(self.entries[0]), self.root)

    def config_of(self, entry: ComparedRun) -> Config:
        """Return the config of a run: its optimizer and search seed, with the questions and random masks of all."""
        search = {"optimizer": entry.optimizer, "seed": entry.seed, "evaluation_seed": self.config.evaluation_seed}
        return self.config.model_copy(update={"search": self.config.search.model_copy(update=search)})

    def check(self) -> None:
        """Raise UserError for a mistake in the config of any optimizer, for folders of other comparisons, and for
        questions or models that have changed since a run began, unless all runs are finished.
        """
        for kind in {"minutes", "cost"} & self.config.search.budget.bounds.keys():
            raise ConfigError(f"search.budget: {self.config.search.budget}: {UNFAIR[kind]}")
        if voted := next((task.name for task in self.config.tasks if task.votes), None):
            raise ConfigError(
                f"tasks: {voted} is voted on by a person, and votes count in one run only; compare with tasks whose"
                " scores hold for every run, such as one with `judge:`"
            )
        ahead: dict[str, ComparedRun] = {}
        states = self.states()
        for entry, state in states.items():
            if state.started:
                _check_same(entry, parse_logged(state.started.config, str(entry.folder)), self.config_of(entry))
            if not state.finished:
                ahead[entry.optimizer] = entry
                if state.started:
                    recorded = read_log(entry.folder)
                    trust.check(recorded, entry.folder, self.trusted, self.config_of(entry), self.root)
        for entry, state in states.items():
            if ahead and state.started and (found := changed_facts(self.scorer, state.started)):
                raise RunError(refused(entry.folder, found, "change that back, or compare anew in another --out"))
        for entry in ahead.values():
            self._experiment(entry).check()

    @property
    def without_llm(self) -> list[str]:
        """The optimizers that ask an LLM, and here have none."""
        seed = self.config.search.seed
        return [name for name in self.optimizers if self._experiment(ComparedRun(name, seed, self.out)).lacks_llm]

    def states(self) -> dict[ComparedRun, RunState]:
        """Return the state of every run, empty where it has not begun."""
        logs = {entry: entry.folder / LOG for entry in self.entries}
        return {entry: RunState.fold(iter(read_log(log) if log.exists() else ())) for entry, log in logs.items()}

    def play(self, watch: Watch) -> Generator[ComparedRun]:
        """Begin or resume every run and carry it to its end. Yields each after its end.

        The runs call `watch` one at a time. The first error of a run ends all of them.
        """
        states = self.states()
        for entry, state in states.items():
            self.scorer.remember(state, entry.name)
        yield from [entry for entry, state in states.items() if state.finished]
        ahead = deque(entry for entry, state in states.items() if not state.finished)
        try:
            if ahead and min(len(ahead), self.scorer.workers.count) > 1:
                yield from self._play_together(ahead, watch)
            else:
                for entry in ahead:
                    self._carry_on(entry, watch)
                    yield entry
        finally:
            self.scorer.close()

    @property
    def at_once(self) -> int:
        """How many runs go on at the same time, at most."""
        return min(len(self.entries), self.scorer.count_workers())

    def _play_together(self, ahead: "deque[ComparedRun]", watch: Watch) -> Generator[ComparedRun]:
        """Carry several runs on at the same time, each in a thread of its own."""
        turns, ended, stderr = Turns(), Ended(), sys.stderr
        running: dict[ComparedRun, threading.Thread] = {}

        def carry_on(entry: ComparedRun) -> None:
            error: BaseException | None = None
            try:
                with turns:
                    self._carry_on(entry, watch, turns)
            except BaseException as raised:
                error = raised
            ended.put((entry, error))

        try:
            while ahead or running:
                while ahead and len(running) < self.scorer.workers.count:
                    entry = ahead.popleft()
                    running[entry] = threading.Thread(target=carry_on, args=(entry,), name=entry.name, daemon=True)
                    running[entry].start()
                entry, error = _awaited(ended)
                running.pop(entry).join()
                if error:
                    raise error
                yield entry
        finally:
            turns.stop()
            for thread in running.values():
                thread.join(PATIENCE)
            sys.stderr = stderr  # a run that is left behind may have redirected it, as tasks do while they are scored

    def _experiment(self, entry: ComparedRun) -> Experiment:
        return Experiment(self.config_of(entry), self.root, self.api_key, shared=self.scorer, name=entry.name)

    def _carry_on(self, entry: ComparedRun, watch: Watch, turns: "Turns | None" = None) -> None:
        with RunLog(entry.folder, resume=(entry.folder / LOG).exists()) as log:
            started = RunState.fold(iter(log.recorded)).started
            if started is None:
                experiment = self._experiment(entry)
                log.write("config.yml", self.text)
            else:
                experiment = Experiment.of_log(started, entry.folder, self.api_key, self.scorer, entry.name)
            if turns:
                experiment.verdicts.waiting = turns.waiting
                if experiment.asks:
                    experiment.proposer = Awaited(experiment.proposer, turns)
            try:
                loop.carry_on(experiment, log, [lambda event, state: watch(entry, event, state)])
            finally:
                experiment.leave_workers()


Ended = queue.SimpleQueue[tuple[ComparedRun, BaseException | None]]


def _awaited(ended: Ended) -> tuple[ComparedRun, BaseException | None]:
    """Return the next run that ends, and its error.

    A function of its own: Python 3.11 skips a `finally` when a signal interrupts a `continue` of an `except` below it.
    """
    while True:
        with suppress(queue.Empty):
            return ended.get(timeout=1.0)  # with a time limit, so that Ctrl-C is heard


class Stopped(BaseException):
    """Raised in a run that waits when the comparison is stopped."""


class Turns:
    """Runs in threads that take turns: one computes, while the others wait for scores or answers.

    Nothing is gained if several compute, for Python runs one thread at a time; and what they share is made for one:
    tasks, the number of threads of numerical libraries (which decides digits), the display.
    """

    def __init__(self) -> None:
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @contextmanager
    def others(self) -> Generator[None]:
        """Let others compute meanwhile."""
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Let others compute meanwhile; raises Stopped when the comparison ends."""
        try:
            with self.others():
                yield
        finally:
            if self._stopped.is_set():
                raise Stopped

    def stop(self) -> None:
        """End all runs at their next wait."""
        self._stopped.set()


class Awaited:
    """An LLM client whose answers are awaited while other runs go on."""

    def __init__(self, client: Client, turns: Turns) -> None:
        self._client, self._turns = client, turns

    @property
    def model(self) -> str:
        return self._client.model

    @property
    def style(self) -> str:
        return self._client.style

    def check(self) -> None:
        self._client.check()

    def answer(self, request: Request) -> Reply:
        with self._turns.others():
            return self._client.answer(request)


def siblings(run: Path, started: events.RunStarted) -> list[RunState]:
    """Return the other runs of the comparison that a run belongs to, as far as their logs can be read."""
    here, found = run.absolute(), list[RunState]()
    for log in sorted(here.parent.glob(f"*/{LOG}")) if _is_entry(here, started) else ():
        with suppress(LlmevoError, OSError):
            state = RunState.fold(iter(Tail(log.parent).new()))
            other = state.started
            if log.parent != here and other and _is_entry(log.parent, other) and _scores_equal(started, other):
                found.append(state)
    return found


def _is_entry(run: Path, started: events.RunStarted) -> bool:
    """Return whether a run lies in the folder of a `ComparedRun`."""
    search = started.config.get("search") or {}
    return run == ComparedRun(search.get("optimizer", ""), search.get("seed", 0), run.parent).folder


def _scores_equal(one: events.RunStarted, other: events.RunStarted) -> bool:
    """Return whether equal recipes of two runs have equal scores: the same questions, models and random masks."""
    return (one.questions, one.sources, one.masks) == (other.questions, other.sources, other.masks)


def optimizers_of(names: str) -> list[str]:
    """Return the optimizers of a comma-separated list, each once; `llm` brings `llm-off`, its search without an LLM.

    Raises ConfigError for an unknown one.
    """
    given = [*dict.fromkeys(name.strip() for name in names.split(",") if name.strip())]
    for name in given or [""]:
        if name not in every():
            raise ConfigError(f"--optimizers: {name!r} is unknown{nearest(name, every())}")
    if "llm" in given and "llm-off" not in given:
        given.insert(given.index("llm") + 1, "llm-off")
    return given


def _check_same(entry: ComparedRun, begun: Config, now: Config) -> None:
    """Raise RunError where a run was begun with another config."""
    one, other = (changes.config_facts(config.model_dump(mode="json")) for config in (begun, now))
    if found := changes.differences(one, other):
        raise RunError(
            f"{entry.folder} was begun with another config:\n{changes.table(found)}\ngive the config that it was begun"
            " with, or another --out"
        )
