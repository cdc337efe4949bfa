"""Runs from Python: carry one out, open one, read its trials and scores, export its models."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmevo.config import Config, parse_config, read_config
from llmevo.errors import ConfigError, RunError
from llmevo.merging.recipe import Recipe
from llmevo.run.experiment import Experiment
from llmevo.run.log import events
from llmevo.run.log.changes import table
from llmevo.run.log.journal import Observer
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import RunLog, consistent_log, holds_run, read_log
from llmevo.run.start import check_start, new_log

if TYPE_CHECKING:  # a run is read without torch and the hub's client, which take seconds to import
    from llmevo.export.model import Export

Warn = Callable[[str], None]

HELD_OUT = {"score", "stderr", "tasks", "items", "candidate", "kind"}
"""What `Run.as_dict` has of a held-out row; the log has all."""

warn_by_logging: Warn = logging.getLogger("llmevo").warning


@dataclass(frozen=True)
class TrialRow:
    """A candidate of a run with its score; `pandas.DataFrame(run.trials)` makes a table of them."""

    id: int
    generation: int
    origin: str
    """`parent`, `uniform`, `coefficient`, `user`, `llm`, or the numeric optimizer's name."""
    note: str
    genes: Mapping[str, float]
    recipe: Recipe
    score: float | None
    """On the search questions; None for a candidate that failed."""
    stderr: float | None
    items: int
    """Questions answered; fewer than others where racing stopped the candidate."""
    tasks: Mapping[str, Mapping[str, float]]
    """{task: {metric: value}}"""
    reason: str
    """Why it failed, or which constraints it violates."""
    path: str = ""
    """The text form of a layer path; the genes are then of the weight merge in it, or none."""


class Run:
    """A run as its log had it when it was opened; see `open_run`.

    >>> import llmevo
    >>> run = llmevo.open_run("runs/example")
    >>> run.is_finished, run.config.search.optimizer
    (True, 'random')
    >>> [trial.origin for trial in run.trials][:2]
    ['uniform', 'coefficient']
    >>> run.best.score >= run.trials[0].score
    True
    >>> [name for name in run.heldout if not name.startswith("coefficient")]
    ['base', 'one', 'two', 'uniform', 'best']
    >>> run.export("merged")
    PosixPath('merged')
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events = read_log(folder)
        """The log, event by event."""
        with consistent_log(folder):
            self.state = RunState.fold(iter(self.events))

    @cached_property
    def experiment(self) -> Experiment:
        """The models, tasks and optimizer of the run; each is loaded when it is used."""
        return Experiment.of_log(self.state.started, self.folder)

    @property
    def config(self) -> Config:
        return self.experiment.config

    @property
    def is_finished(self) -> bool:
        return self.state.finished is not None

    @cached_property
    def trials(self) -> list[TrialRow]:
        """All candidates that were scored or failed, in their order."""
        with consistent_log(self.folder):
            return [
                TrialRow(
                    number,
                    trial.candidate.generation,
                    trial.candidate.origin,
                    trial.candidate.note,
                    trial.candidate.genes,
                    Recipe.model_validate(self.state.recipes[number]),
                    trial.score.total if trial.score else None,
                    trial.score.stderr if trial.score else None,
                    trial.score.items if trial.score else 0,
                    trial.score.tasks if trial.score else {},
                    trial.reason,
                    trial.candidate.path,
                )
                for number, trial in sorted(self.state.trials.items())
            ]

    @property
    def best(self) -> TrialRow | None:
        """The candidate that the run returns; None where none has a score."""
        best = self.state.best
        return next((row for row in self.trials if best and row.id == best.candidate.id), None)

    def as_dict(self) -> dict[str, Any]:
        """The run in plain values, as `llmevo report --json` prints it."""
        best = self.best
        return {
            "run": str(self.folder),
            "finished": self.is_finished,
            "optimizer": self.config.search.optimizer,
            "best": best.id if best else None,
            "heldout": {name: of.model_dump(mode="json", include=HELD_OUT) for name, of in self.heldout.items()},
            "trials": [{**vars(row), "recipe": row.recipe.as_dict()} for row in self.trials],
        }

    @property
    def heldout(self) -> dict[str, events.HeldOut]:
        """The held-out scores of `best` and of what it has to beat, by name, each with `score`, `stderr` and `tasks`;
        empty before the end.
        """
        return self.state.heldout

    def export(
        self,
        out: Path | str,
        candidate: int | None = None,
        *,
        as_: str | None = None,
        rank: str | int | None = None,
        energy: float | None = None,
        parameters: int | str | None = None,
        donor: Path | str | None = None,
        recipe_only: bool = False,
        force: bool = False,
        trust: bool = False,
    ) -> Path:
        """Write a candidate, by default the best, as a Hugging Face model into a new folder, and return the folder.

        `as_` and the options after it choose another format: see `llmevo.merge`. `recipe_only` writes recipe, card,
        config and log instead, to share. Raises RunError when a model has changed since the run, unless `force` is set,
        and when a log from elsewhere names tasks that are to be loaded, unless `trust` is set: only where `prepare`
        reads questions, or a mixture has a router, that the run's folder lacks. Raises UserError when `out` holds
        something or an option cannot be used.
        """
        from llmevo.export.formats import Format

        format_ = Format.of(as_, rank, energy, parameters, donor)
        exported = self.prepare_export(Path(out), candidate, recipe_only, force, trust)
        if recipe_only:
            exported.write_recipe(Path(out))
        else:
            exported.write(self.experiment.sources, Path(out), format_)
        return Path(out)

    def prepare_export(
        self,
        out: Path,
        candidate: int | None,
        recipe_only: bool,
        force: bool,
        trust: bool = False,
        warn: Warn = warn_by_logging,
    ) -> "Export":
        """Check everything that `export` checks and return what it writes."""
        from llmevo.export.model import Export
        from llmevo.merging.writer import check_new
        from llmevo.run.resume import changed_models
        from llmevo.run.trust import check

        experiment = self.experiment
        assert self.state.started is not None
        check_new(out)
        experiment.scorer.warn = warn
        changed = [] if recipe_only else changed_models(experiment.scorer, self.state.started)
        if changed and not force:
            raise RunError(
                f"{self.folder}: a model has changed since the run began, so the exported weights would not be those"
                f" that were scored:\n{table(changed)}\nrestore the model, or export with --force; the card then says"
                " that the model has changed"
            )
        with consistent_log(self.folder):
            exported = Export.of(self.folder, self.events, experiment, candidate, changed)
        if exported.loads_tasks and (exported.recipe.mixture or not recipe_only):
            check(self.events, self.folder, trust)
        return exported


def open_run(folder: Path | str) -> Run:
    """Open a run's folder, finished or not; loads no model.

    Raises RunError when the folder holds no run.

    >>> import llmevo
    >>> llmevo.open_run("runs/example").best.recipe.merge_method
    'task_arithmetic'
    """
    return Run(Path(folder))


def evolve(
    config: Config | Mapping[str, Any] | Path | str,
    folder: Path | str,
    *,
    root: Path | str | None = None,
    api_key: str | None = None,
    resume: bool = False,
    observe: Observer | None = None,
    warn: Warn = warn_by_logging,
) -> Run:
    """Search for the best merge, as `llmevo run` does, and return the finished run.

    `config` is a file, its values, or a `Config`; relative paths in it start at `root`, by default the file's folder or
    the working directory. `folder` becomes the run's folder; with `resume` a run in it continues. `observe` is called
    with every event and the state after it. `warn` gets the warnings, by default the logger `llmevo`.

    Raises what `llmevo run` shows: UserError for what the config or a model does not allow, MachineError for a failure
    of the machine, after which `resume=True` continues.

    >>> import llmevo
    >>> config = {
    ...     "genome": {"base_model": "base", "models": ["one", "two"], "merge_method": "task_arithmetic"},
    ...     "tasks": [{"name": "letters", "weight": 1.0}],
    ...     "task_search_path": ["tasks"],
    ...     "search": {"optimizer": "random", "budget": 9},
    ... }
    >>> run = llmevo.evolve(config, "runs/first")
    >>> len(run.trials)
    9
    """
    out = Path(folder)
    if isinstance(config, Path | str):
        given, text = read_config(Path(config)), Path(config).read_text()
        root = Path(config).parent if root is None else root
    else:
        given = config if isinstance(config, Config) else parse_config(config, "config")
        text = yaml.safe_dump(given.model_dump(mode="json", exclude_unset=True), sort_keys=False)
    start = Path(root or ".").absolute()
    check_start(given, start)
    if voted := next((task.name for task in (*given.tasks, *given.heldout) if task.votes), None):
        raise ConfigError(f"tasks: {voted} is voted on in a terminal; use `llmevo run`")
    if resume and holds_run(out):
        from llmevo.run.resume import prepare

        with RunLog(out, resume=True) as log:
            _carry_on(prepare(log, given, start, api_key=api_key, warn=warn), log, given, observe, warn)
    else:
        experiment = Experiment(given, start, api_key)
        experiment.scorer.warn = warn
        with new_log(experiment, out, text) as log:
            _carry_on(experiment, log, given, observe, warn)
    return open_run(out)


def _carry_on(experiment: Experiment, log: RunLog, config: Config, observe: Observer | None, warn: Warn) -> None:
    from llmevo.run import loop
    from llmevo.run.trackers import forwarded

    with forwarded(config.loggers, log.place, warn) as trackers:
        loop.carry_on(experiment, log, [*([observe] if observe else []), *trackers])
