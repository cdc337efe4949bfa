"""Every optimizer for every seed on one scorer: each a run like any other, what one has scored known to all."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmevo.config import Config, parse_logged
from llmevo.errors import ConfigError, RunError, nearest
from llmevo.run import loop, trust
from llmevo.run.experiment import Experiment
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, RunLog, read_log
from llmevo.search.optimizers import OPTIMIZERS

if TYPE_CHECKING:  # see `Experiment`
    from llmevo.run.scorer import Scorer


@dataclass(frozen=True)
class Entry:
    """One optimizer with one seed."""

    optimizer: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.optimizer}, seed {self.seed}"


UNFAIR = {
    "minutes": "minutes say nothing in a comparison, where a score that one run has costs the others no time; give"
    " evaluations or items",
    "cost": "only some optimizers have a cost, so their runs would end at different evaluations; give evaluations or"
    " items, and llm.max_cost (--max-cost) for the LLM, after which a run goes on without it",
}
"""Why a bound is none for a comparison, and what is."""


Watch = Callable[[Entry, events.Event, RunState], None]
"""Shown every event of every run."""


@dataclass(frozen=True)
class Sweep:
    """The runs of a comparison, seed by seed, so that stopping early leaves whole seeds."""

    config: Config
    text: str
    """The config as it was given."""
    root: Path
    out: Path
    optimizers: Sequence[str]
    seeds: int
    api_key: str | None = None
    trusted: bool = False
    """Whether logs that were begun elsewhere may do what they say: see `llmevo.run.trust`."""

    @property
    def entries(self) -> list[Entry]:
        """In the order they are run."""
        first = self.config.search.seed
        return [
            Entry(optimizer, seed, self.out / f"{optimizer}-{seed}")
            for seed in range(first, first + self.seeds)
            for optimizer in self.optimizers
        ]

    @cached_property
    def scorer(self) -> "Scorer":
        """What all of them score with."""
        from llmevo.run.scorer import Scorer

        return Scorer(self.config_of(self.entries[0]), self.root)

    def config_of(self, entry: Entry) -> Config:
        """The search seed changes; questions and random masks stay the same for all."""
        search = {"optimizer": entry.optimizer, "seed": entry.seed, "evaluation_seed": self.config.evaluation_seed}
        return self.config.model_copy(update={"search": self.config.search.model_copy(update=search)})

    def check(self) -> None:
        """Find the user's mistakes before anything is written: each optimizer's, and folders of other comparisons."""
        for kind in {"minutes", "cost"} & self.config.search.budget.bounds.keys():
            raise ConfigError(f"search.budget: {self.config.search.budget}: {UNFAIR[kind]}")
        if voted := next((task.name for task in self.config.tasks if task.votes), None):
            raise ConfigError(
                f"tasks: {voted} is voted on by a person, so its scores are those of one run; compare with tasks that"
                " score every run alike, such as one with `judge:`"
            )
        states = self.states()
        for entry, state in states.items():
            if state.started:
                _check_same(entry, parse_logged(state.started.config, str(entry.folder)), self.config_of(entry))
                if not state.finished:
                    recorded = read_log(entry.folder)
                    trust.check(recorded, entry.folder, self.trusted, self.config_of(entry), self.root)
        ahead = {entry.optimizer: entry for entry, state in states.items() if not state.finished}
        for entry in ahead.values():
            Experiment(self.config_of(entry), self.root, self.api_key, shared=self.scorer).check()

    def states(self) -> dict[Entry, RunState]:
        """What the logs say so far; nothing of runs that have not begun."""
        logs = {entry: entry.folder / LOG for entry in self.entries}
        return {entry: RunState.fold(iter(read_log(log) if log.exists() else ())) for entry, log in logs.items()}

    def play(self, watch: Watch) -> Iterator[Entry]:
        """Carry every run to its end, from wherever it stands. Yields each that has come to it."""
        states = self.states()
        for state in states.values():
            self.scorer.remember(state)
        for entry, state in states.items():
            if not state.finished:
                self._carry_on(entry, watch)
            yield entry

    def _carry_on(self, entry: Entry, watch: Watch) -> None:
        with RunLog(entry.folder, resume=(entry.folder / LOG).exists()) as log:
            started = RunState.fold(iter(log.recorded)).started
            if started is None:
                experiment = Experiment(self.config_of(entry), self.root, self.api_key, shared=self.scorer)
                log.write("config.yml", self.text)
            else:
                experiment = Experiment.of_log(started, entry.folder, self.api_key, self.scorer)
            loop.carry_on(experiment, log, [lambda event, state: watch(entry, event, state)])


def contestants(names: str) -> list[str]:
    """The optimizers in a list with commas, each once; beside `llm` always the same search without its LLM.

    Raises ConfigError for an unknown one.
    """
    given = [*dict.fromkeys(name.strip() for name in names.split(",") if name.strip())]
    for name in given or [""]:
        if name not in OPTIMIZERS:
            raise ConfigError(f"--optimizers: {name!r} is unknown{nearest(name, OPTIMIZERS)}")
    if "llm" in given and "llm-off" not in given:
        given.insert(given.index("llm") + 1, "llm-off")
    return given


def _check_same(entry: Entry, begun: Config, now: Config) -> None:
    """Raise RunError when a run was begun with another config."""
    one, other = (config.model_dump(mode="json") for config in (begun, now))
    for path, old, new in _differences(one, other):
        raise RunError(
            f"{entry.folder} was begun with {path} {old!r}, now it is {new!r}; give what the comparison was begun with,"
            " or another --out"
        )


def _differences(one: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from _differences(one.get(key), other.get(key), f"{path}.{key}".lstrip("."))
    elif one != other:
        yield path, one, other
