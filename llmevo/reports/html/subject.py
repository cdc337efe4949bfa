"""What a report is about: a log's run, its config and its search space. Loads no model and no task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from llmevo.config import Config
from llmevo.evaluation.tasks.task import Task, short
from llmevo.run.experiment import Experiment
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import read_log
from llmevo.run.spending import Spending
from llmevo.search.prompts.question import Question
from llmevo.search.space import SearchSpace
from llmevo.search.trial import Trial


@dataclass(frozen=True)
class Subject:
    """A run as its log tells it."""

    folder: Path
    """As the user named it; shown in commands."""
    state: RunState
    started: events.RunStarted
    config: Config
    space: SearchSpace

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Read a run's log, finished or not. Raises RunError when there is none, or when it has no beginning."""
        state = RunState.fold(iter(read_log(folder)))
        config = Experiment.of_log(state.started, folder).config
        assert state.started is not None  # of_log has seen to that
        return cls(folder, state, state.started, config, SearchSpace(config.genome, state.started.layers))

    @property
    def spending(self) -> Spending:
        """What the run has spent of its budget."""
        return Spending(self.config.search.budget, self.state)

    @cached_property
    def scored(self) -> list[Trial]:
        return [trial for trial in self.state.trials.values() if trial.score]

    @cached_property
    def tasks(self) -> Mapping[str, str]:
        """The short name of each search task."""
        return dict(zip(self.config.counted, short([*self.config.counted]), strict=True))

    @cached_property
    def heldout_tasks(self) -> Mapping[str, tuple[str, Task]]:
        """The short name of each held-out task, and the task."""
        names = [task.name for task in self.config.heldout_tasks]
        return {
            task.name: (shown, task)
            for task, shown in zip(self.config.heldout_tasks, short(names) if names else [], strict=True)
        }

    @cached_property
    def rival(self) -> events.HeldOut | None:
        """The parent with the highest held-out score."""
        parents = [row for row in self.state.heldout.values() if row.kind == "parent"]
        return max(parents, key=lambda row: row.score, default=None)

    def question(self, trials: Sequence[Trial] | None = None) -> Question:
        """What an LLM may know of these trials, by default of all."""
        trials = [*self.state.trials.values()] if trials is None else trials
        return Question(
            self.space,
            trials,
            self.config.counted,
            wanted=20,
            generation=0,
            sigma=0.0,
            used=len(trials),
            budget=len(trials),
            mask_names=self.config.llm.mask_names,
        )


def metric_of(tasks: Mapping[str, Mapping[str, float]], name: str, metric: str) -> tuple[float | None, float | None]:
    """A task's counted metric and its standard error; None where the score lacks them."""
    found = tasks.get(name, {})
    base, _, filter_ = metric.partition(",")
    return found.get(metric), found.get(f"{base}_stderr,{filter_}")
