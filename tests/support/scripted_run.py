"""Whole runs whose workers are scripted: real models and questions at the driver, no engine anywhere."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from llmevo.cli import live, terminal
from llmevo.config import Config, parse_config
from llmevo.evaluation.score import Score
from llmevo.run.experiment import Experiment
from llmevo.run.log.events import Event, RunStarted
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import RunLog, holds_run
from llmevo.run.loop import carry_on
from llmevo.run.scorer import Scorer
from llmevo.workers.pool import Limits, Pool
from llmevo.workers.processes import Processes
from llmevo.workers.protocol import Job
from support.scripted import FACTS, Script, Scripted

Blocks = Mapping[str, list[dict[str, list[int]]]]
"""{set of questions: {task: places} of each part}."""


@dataclass
class Answering(Scripted):
    """A worker that answers a run's questions; which ones rightly follows from the recipe."""

    blocks: Blocks = field(default_factory=dict[str, list[dict[str, list[int]]]])

    def answers(self, job: Job) -> Score:
        recipe = json.dumps(job.recipe.as_dict(), sort_keys=True)
        skill = share(recipe)
        block = self.blocks[job.questions][job.part]
        items = {
            task: [float(skill > (share(job.questions, task, place) + share(recipe, task, place)) / 2) for place in own]
            for task, own in block.items()
        }
        means = {task: sum(own) / len(own) for task, own in items.items()}
        metrics = {task: {"acc,none": mean, "acc_stderr,none": 0.1} for task, mean in means.items()}
        replies = {task: ["yes" if value else "no" for value in own] for task, own in items.items()}
        return Score(sum(means.values()), 0.1, metrics, sum(map(len, items.values())), items, replies)


def share(*words: object) -> float:
    """A number from 0 to 1 that follows from the words."""
    return int(hashlib.sha256(repr(words).encode()).hexdigest()[:8], 16) / 16**8


@dataclass
class ScriptedRig(Scorer):
    """The scorer of a run: all of it is real but for the workers."""

    script: Script = field(default_factory=lambda: Script(Path()))
    limits: Limits = field(default_factory=Limits)

    @cached_property
    def workers(self) -> Any:
        blocks = {name: [dict(block) for block in each.blocks] for name, each in self.evaluators.items()}
        opening = partial(Answering, self.script, blocks=blocks)
        return Pool(Processes(opening, self.count_workers(), threads=1), self, FACTS, self.limits)


def config_in(root: Path, workers: int = 2, optimizer: str = "llm-off", budget: int = 16, **changes: Any) -> Config:
    """Of the workspace's models and tasks; `changes` are keys of the config, of `search` those of a dictionary."""
    search = {"optimizer": optimizer, "budget": budget, "population": 4, "seed": 3, **changes.pop("search", {})}
    raw = {
        "genome": {"base_model": "base", "models": ["one", "two"], "merge_method": "task_arithmetic"},
        "tasks": ["letters"],
        "heldout": ["letters_heldout"],
        "apply_chat_template": False,
        "task_search_path": ["tasks"],
        "limit": 40,
        "search": search,
        "llm": {"proposer": "simulated", "model": "random"},
        "engine": {"workers": workers, "on": "processes"},
        **changes,
    }
    return parse_config(raw, str(root))


def experiment_of(config: Config, root: Path, script: Script, recorded: list[Event]) -> Experiment:
    """As it is made anew after every stop; the number of workers may be another than before."""
    begun = RunState.fold(iter(recorded)).started if recorded else None
    assert begun is None or isinstance(begun, RunStarted)
    experiment = Experiment(config, root, recorded=begun)
    experiment.scorer = ScriptedRig(config, root, verdicts=experiment.verdicts, script=script)
    return experiment


def carried_on(config: Config, root: Path, script: Script, folder: Path) -> None:
    """Begin or go on, to the end."""
    with RunLog(folder, resume=holds_run(folder)) as log:
        carry_on(experiment_of(config, root, script, log.recorded), log)


def in_child(config: Config, root: Path, script: Script, folder: Path, output: Path) -> None:
    """The same in a session of its own, as the command line does it."""
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    with terminal.errors_shown(), terminal.stoppable(), RunLog(folder, resume=holds_run(folder)) as log:
        live.carry_on(experiment_of(config, root, script, log.recorded), log, config)


def essence(log: list[Event]) -> list[dict[str, Any]]:
    """What a log says, but for times, workers and the order of arrival."""
    kept: list[dict[str, Any]] = []
    arriving: list[dict[str, Any]] = []
    for event in log:
        said = event.model_dump(mode="json", exclude={"time", "seconds", "workers", "losses"})
        if said["event"] == "worker":
            continue
        said.get("config", {}).pop("engine", None)
        if said["event"] in ("evaluated", "failed"):
            arriving.append(said)
            continue
        kept += sorted(arriving, key=lambda each: each["candidate"])
        arriving = []
        kept.append(said)
    return kept + arriving
