"""A run whose engine and LLM are counted stand-ins, to be killed and resumed: the only fakes are at the edge."""

import hashlib
import json
import os
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmevo.cli import live
from llmevo.cli.terminal import errors_shown
from llmevo.config import Config, parse_config
from llmevo.evaluation.score import Score
from llmevo.llm.client import Connection, Reply, Request
from llmevo.merging.recipe import Recipe
from llmevo.run import loop
from llmevo.run.experiment import Experiment
from llmevo.run.log.events import Event, RunStarted, Told
from llmevo.run.log.storage import LOG, RunLog, holds_run
from llmevo.run.scorer import Scorer
from llmevo.search.simulated_llm import SimulatedClient


@dataclass
class CountedRig(Scorer):
    """Scores follow from the recipe; every scoring is counted, and written down where a kill does not reach."""

    scored: list[str] = field(default_factory=list[str])
    seconds: float = 0.0
    diary: Path | None = None

    def score(
        self, recipe: Recipe, questions: str = "search", rivals: Sequence[Score] = (), quantize: str = ""
    ) -> tuple[Score, Mapping[str, float]]:
        name = f"{questions}{quantize} {json.dumps(recipe.as_dict(), sort_keys=True)}"
        value = int(hashlib.sha256(name.encode()).hexdigest()[:6], 16) / 16**6
        time.sleep(self.seconds)
        self.scored.append(name)
        if self.diary:
            with self.diary.open("a") as stream:
                stream.write(f"{os.getpid()} {hashlib.sha256(name.encode()).hexdigest()}\n")
        task = "letters_heldout" if questions == "heldout" else "letters"
        return Score(value, 0.1, {task: {"acc,none": value}}, 12), {"evaluate": 0.25}


class CountedProposer(SimulatedClient):
    """Counts what it is asked."""

    asked = 0

    def answer(self, request: Request) -> Reply:
        self.asked += 1
        return super().answer(request)


def config_in(root: Path, optimizer: str, budget: int, **changes: Any) -> Config:
    """Of the workspace's models and tasks; `changes` are keys of the config, of `search` those of a dictionary."""
    search = {"optimizer": optimizer, "budget": budget, "population": 4, "seed": 3, **changes.pop("search", {})}
    raw = {
        "genome": {"base_model": "base", "models": ["one", "two"], "merge_method": "task_arithmetic"},
        "tasks": ["letters"],
        "heldout": ["letters_heldout"],
        "apply_chat_template": False,
        "task_search_path": ["tasks"],
        "search": search,
        "llm": {"proposer": "simulated"},
        **changes,
    }
    return parse_config(raw, str(root))


def bench_of(scorer: Scorer, recorded: list[Event]) -> Experiment:
    """As it is made anew after every stop."""
    begun = recorded[0] if recorded else None
    experiment = Experiment(
        scorer.config, scorer.root, recorded=begun if isinstance(begun, RunStarted) else None, shared=scorer
    )
    experiment.proposer = CountedProposer(Connection(model="random"))
    return experiment


def carry_on(scorer: CountedRig, folder: Path) -> tuple[int, int]:
    """Begin or go on, to the end. How often it scored and asked the LLM."""
    scorer.scored.clear()
    with RunLog(folder, resume=(folder / LOG).exists() and holds_run(folder)) as log:
        experiment = bench_of(scorer, log.recorded)
        loop.carry_on(experiment, log)
    proposer: Any = experiment.proposer
    return len(scorer.scored), proposer.asked


def in_child(root: Path, folder: Path, seconds: float, room: int | None, output: Path) -> None:
    """The same in a process of its own, as the command line does it; `room`: bytes a file may have."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    scorer = CountedRig(config_in(root, "llm", 24), root, seconds=seconds, diary=root / "diary")
    with errors_shown(), RunLog(folder, resume=holds_run(folder)) as log:
        live.carry_on(bench_of(scorer, log.recorded), log, scorer.config)


def hold(folder: Path, ready: Path) -> None:
    """Open a log, leave a child behind that would hold it, and wait to be killed."""
    with RunLog(folder, resume=True):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        ready.touch()
        time.sleep(60)


def begin(folder: Path, gate: Path, won: Path) -> None:
    """Try to begin a run together with others."""
    while not gate.exists():
        time.sleep(0.001)
    with errors_shown(), RunLog(folder) as log:
        log.append(Told(generation=0, state="", sigma=None, best=None))
        won.touch()
