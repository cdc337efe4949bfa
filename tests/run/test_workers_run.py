"""Whole runs with workers: the same whatever their number and fate, and resumed after any stop."""

import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from llmevo.errors import MachineError
from llmevo.run.log import events
from llmevo.run.log.state import RunState
from llmevo.run.log.storage import read_log
from llmevo.run.verify import verify
from support import scripted_run
from support.scripted import Script
from support.scripted_run import config_in, essence
from support.workers import assert_gone, until
from support.workspace import write_task


@dataclass
class Place:
    """A folder with models and questions, and the runs in it."""

    root: Path

    def script(self, name: str, acts: dict[Any, str] | None = None, seconds: float = 0.0) -> Script:
        folder = self.root / f"{name}-workers"
        folder.mkdir(exist_ok=True)
        return Script(folder, acts or {}, seconds)

    def run(self, name: str, acts: dict[Any, str] | None = None, **config: Any) -> list[events.Event]:
        """Begin a run or go on with it, to its end; no process may be left."""
        script = self.script(name, acts)
        try:
            scripted_run.carried_on(config_in(self.root, **config), self.root, script, self.root / name)
        finally:
            assert_gone(script.processes())
        return self.log(name)

    def log(self, name: str) -> list[events.Event]:
        return read_log(self.root / name)


@pytest.fixture
def place(tmp_path: Path, models: Path) -> Place:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    write_task(tmp_path, "letters", 0, size=80)
    write_task(tmp_path, "letters_heldout", 1, size=20)
    return Place(tmp_path)


def check_whole(log: list[events.Event], folder: Path, budget: int = 16) -> None:
    """Every candidate is scored and told once, and the log follows from its config."""
    state = RunState.fold(iter(log))
    assert state.finished
    told = Counter(number for event in log if isinstance(event, events.Told) for number in event.candidates)
    assert told == Counter(range(budget))
    ends = [event.candidate for event in log if isinstance(event, events.Evaluated | events.Failed)]
    again = len(ends) - len({*ends})
    assert again <= sum(isinstance(event, events.Selected) for event in log)  # finalists that racing had stopped
    assert verify(log, folder)


def test_probe(place: Place) -> None:
    logs = {}
    for workers in (1, 2, 4):
        t = time.time()
        logs[workers] = place.run(f"with-{workers}", workers=workers, optimizer="cma-es")
        print(workers, time.time() - t)
        check_whole(logs[workers], place.root / f"with-{workers}")
        print(Counter(e.event for e in logs[workers]))
        print(Counter(e.items for e in logs[workers] if isinstance(e, events.Evaluated)))
    for line in logs[1]:
        print(line.model_dump_json()[:200])
    assert essence(logs[1]) == essence(logs[2]) == essence(logs[4])
