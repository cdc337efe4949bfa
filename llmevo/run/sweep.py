"""A comparison: one run for every optimizer and seed, on one scorer, so that a score is computed once for all."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llmevo.config import Config, parse_logged
from llmevo.errors import ConfigError, LlmevoError, RunError, nearest
from llmevo.run import loop, trust
from llmevo.run.experiment import Experiment
from llmevo.run.log import changes, events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import LOG, RunLog, Tail, read_log
from llmevo.search.optimizers import OPTIMIZERS

if TYPE_CHECKING:  # see `Experiment`
    from llmevo.run.scorer import Scorer


@dataclass(frozen=True)
class Entry:
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

Watch = Callable[[Entry, events.Event, RunState], None]
"""Called with every event of every run."""


@dataclass(frozen=True)
class Sweep:
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
    def entries(self) -> list[Entry]:
        """The runs in their order."""
        first = self.config.search.seed
        return [
            Entry(optimizer, seed, self.out)
            for seed in range(first, first + self.seeds)
            for optimizer in self.optimizers
        ]

    @cached_property
    def scorer(self) -> "Scorer":
        """The scorer of all runs."""
        from llmevo.run.scorer import Scorer

        return Scorer(self.config_of(self.entries[0]), self.root)

    def config_of(self, entry: Entry) -> Config:
        """Return the config of a run: its optimizer and search seed, with the questions and random masks of all."""
        search = {"optimizer": entry.optimizer, "seed": entry.seed, "evaluation_seed": self.config.evaluation_seed}
        return self.config.model_copy(update={"search": self.config.search.model_copy(update=search)})

    def check(self) -> None:
        """Raise UserError for a mistake in the config of any optimizer, and for folders of other comparisons."""
        for kind in {"minutes", "cost"} & self.config.search.budget.bounds.keys():
            raise ConfigError(f"search.budget: {self.config.search.budget}: {UNFAIR[kind]}")
        if voted := next((task.name for task in self.config.tasks if task.votes), None):
            raise ConfigError(
                f"tasks: {voted} is voted on by a person, and votes count in one run only; compare with tasks whose"
                " scores hold for every run, such as one with `judge:`"
            )
        ahead: dict[str, Entry] = {}
        for entry, state in self.states().items():
            if state.started:
                _check_same(entry, parse_logged(state.started.config, str(entry.folder)), self.config_of(entry))
            if not state.finished:
                ahead[entry.optimizer] = entry
                if state.started:
                    recorded = read_log(entry.folder)
                    trust.check(recorded, entry.folder, self.trusted, self.config_of(entry), self.root)
        for entry in ahead.values():
            Experiment(self.config_of(entry), self.root, self.api_key, shared=self.scorer).check()

    def states(self) -> dict[Entry, RunState]:
        """Return the state of every run, empty where it has not begun."""
        logs = {entry: entry.folder / LOG for entry in self.entries}
        return {entry: RunState.fold(iter(read_log(log) if log.exists() else ())) for entry, log in logs.items()}

    def play(self, watch: Watch) -> Iterator[Entry]:
        """Begin or resume every run and carry it to its end. Yields each after its end."""
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
    """Return whether a run lies in the folder of an `Entry`."""
    search = started.config.get("search") or {}
    return run == Entry(search.get("optimizer", ""), search.get("seed", 0), run.parent).folder


def _scores_equal(one: events.RunStarted, other: events.RunStarted) -> bool:
    """Return whether equal recipes of two runs have equal scores: the same questions, models and random masks."""
    return (one.questions, one.sources, one.masks) == (other.questions, other.sources, other.masks)


def contestants(names: str) -> list[str]:
    """Return the optimizers of a comma-separated list, each once; `llm` brings `llm-off`, its search without an LLM.

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
    """Raise RunError where a run was begun with another config."""
    one, other = (changes.config_facts(config.model_dump(mode="json")) for config in (begun, now))
    if found := changes.differences(one, other):
        raise RunError(
            f"{entry.folder} was begun with another config:\n{changes.table(found)}\ngive the config that it was begun"
            " with, or another --out"
        )
