"""Whole runs whose workers are scripted: real models and questions at the driver, no engine anywhere."""

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import typer

from llmevo.cli import live, terminal
from llmevo.config import Config
from llmevo.evaluation.score import Score
from llmevo.run.experiment import Experiment
from llmevo.run.log.events import Event, RunStarted
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import RunLog, holds_run
from llmevo.run.loop import carry_on
from llmevo.run.scorer import Scorer
from llmevo.workers.local import Local
from llmevo.workers.pool import Pool
from llmevo.workers.processes import Processes
from llmevo.workers.protocol import Job, Request
from support import resumable
from support.scripted import FACTS, Answering, Script


@dataclass
class ScriptedRig(Scorer):
    """The scorer of a run: all of it is real but for the workers."""

    script: Script = field(default_factory=lambda: Script(Path()))
    alive: int | None = None
    """Workers that there are; by default as many as the config has. 0: the script is played in this process."""

    @cached_property
    def workers(self) -> Any:
        blocks = {name: [dict(block) for block in each.blocks] for name, each in self.evaluators.items()}
        scorer_factory = partial(Answering, self.script, blocks=blocks)
        if self.alive == 0:
            return Local(partial(self.score_here, scorer_factory()))
        return Pool(Processes(scorer_factory, self.alive or self.count_workers(), threads=1), self, FACTS)

    def score_here(self, worker: Answering, request: Request) -> tuple[Score, Mapping[str, float]]:
        """Score as `Scorer.score` does, with the answers of the script."""
        score, count = self.known(request), len(self.parts(request.questions))
        evaluator, place = self.evaluators[request.questions], 0
        if score and (place := evaluator.parts_of(score)) == count:
            return score, {}
        parts, raced, seconds = [score] if score else [], self.is_raced(request), dict[str, float]()
        while True:
            if score and raced and place < count and (stopped := self.stopped(request, score)):
                score, place = stopped, count
            if score and place == count:
                self.keep(request, score)
                return score, seconds
            part, seconds = worker.score_part(Job(request.id, request.recipe, request.questions, place))
            parts, place = [*parts, part], place + 1
            score = self.join(request.questions, parts)


def config_in(root: Path, workers: int = 4, optimizer: str = "llm-off", budget: int = 16, **changes: Any) -> Config:
    """A config with workers; `changes` as of `resumable.config_in`."""
    keys = {
        "limit": 40,
        "llm": {"proposer": "simulated", "model": "random"},
        "engine": {"workers": workers, "on": "processes"},
        **changes,
        "search": {"order": "strict", **changes.get("search", {})},
    }
    return resumable.config_in(root, optimizer, budget, **keys)


def experiment_of(
    config: Config, root: Path, script: Script, recorded: list[Event], alive: int | None = None
) -> Experiment:
    """As it is made anew after every stop; the number of workers may be another than before."""
    begun = RunState.fold(iter(recorded)).started if recorded else None
    assert begun is None or isinstance(begun, RunStarted)
    experiment = Experiment(config, root, recorded=begun)
    experiment.scorer = ScriptedRig(config, root, verdicts=experiment.verdicts, script=script, alive=alive)
    return experiment


def carried_on(config: Config, root: Path, script: Script, folder: Path, alive: int | None = None) -> None:
    """Begin or go on, to the end."""
    with RunLog(folder, resume=holds_run(folder)) as log:
        carry_on(experiment_of(config, root, script, log.recorded, alive), log)


def in_child(config: Config, root: Path, script: Script, folder: Path, output: Path) -> None:
    """The same in a session of its own, as the command line does it."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests' own parent ignores, as nohup does
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    with terminal.errors_shown(), terminal.stoppable(), RunLog(folder, resume=holds_run(folder)) as log:
        try:
            live.carry_on(experiment_of(config, root, script, log.recorded), log, config)
        except typer.Exit as end:
            raise SystemExit(end.exit_code) from None


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
