"""Whole runs with workers: the same whatever their number and fate, and resumed after any stop."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
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
from llmevo.run.log.storage import RunLog, read_log, trust
from llmevo.run.loop import carry_on
from llmevo.run.resume import prepare
from llmevo.run.verify import verify
from llmevo.workers.local import Local
from support import scripted_run
from support.scripted import Script
from support.scripted_run import config_in, essence
from support.workers import assert_gone, until
from support.workspace import Workspace, write_task


@dataclass
class Place:
    """A folder with models and questions, and the runs in it."""

    root: Path

    def script(self, name: str, acts: dict[Any, str] | None = None, seconds: float = 0.0) -> Script:
        folder = self.root / f"{name}-workers"
        folder.mkdir(exist_ok=True)
        return Script(folder, acts or {}, seconds)

    def run(
        self, name: str, acts: dict[Any, str] | None = None, alive: int | None = 2, **config: Any
    ) -> list[events.Event]:
        """Begin a run or go on with it, to its end; no process may be left. `alive`: see `ScriptedRig`."""
        script = self.script(name, acts)
        try:
            scripted_run.carried_on(config_in(self.root, **config), self.root, script, self.root / name, alive)
        finally:
            assert_gone(set(script.processes()) - {os.getpid()})
        return self.log(name)

    def log(self, name: str) -> list[events.Event]:
        return read_log(self.root / name)


@pytest.fixture
def place(tmp_path: Path, models: Path) -> Place:
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    for name, size in (("letters", 60), ("letters_heldout", 20)):
        write_task(tmp_path, name, 0)
        rows = [{"question": f"{name} {n}", "choices": ["a", "b"], "answer": n % 2} for n in range(size)]
        (tmp_path / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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


@pytest.mark.parametrize("order", ["strict", "steady"])
def test_a_golden_log_has_scores_in_the_order_of_arrival_and_a_lost_worker(order: str) -> None:
    log = read_log(Path(__file__).parents[1] / "golden" / f"0.3-workers-{order}.jsonl")
    scored = [event for event in log if isinstance(event, events.Evaluated)]
    numbers = [event.candidate for event in scored]
    assert numbers != sorted(numbers)
    assert {len(event.workers) for event in scored} == {1, 2}
    assert {"1", "2"} <= {worker for event in scored for worker in event.workers}
    (lost,) = [event for event in log if isinstance(event, events.Worker) and event.change == "lost"]
    assert [event.losses for event in scored if event.candidate == lost.request] == [1]
    assert any(event.rival is not None for event in scored)


class Killer(threading.Thread):
    """Kills a worker of this process now and then, at random moments of its life."""

    def __init__(self, most: int) -> None:
        super().__init__(daemon=True)
        self.most, self.killed, self.ends, self.random = most, list[int](), threading.Event(), random.Random(1)

    def run(self) -> None:
        # A worker that does not start twice is left out: after a kill its successor has time to start.
        while len(self.killed) < self.most and not self.ends.wait(
            self.random.uniform(1, 12) + 15 * len(self.killed[:1])
        ):
            children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
            found = [int(number) for file in children for number in file.read_text().split()]
            workers = [n for n in found if b"llmevo.workers" in Path(f"/proc/{n}/cmdline").read_bytes()]
            if workers:
                self.killed.append(self.random.choice(workers))
                os.kill(self.killed[-1], signal.SIGKILL)

    def stop(self) -> None:
        self.ends.set()
        self.join()


SEARCHES: dict[str, dict[str, Any]] = {
    "cma-es": {"optimizer": "cma-es"},
    "llm-off": {"optimizer": "llm-off"},
    "llm": {"optimizer": "llm"},
    "not raced": {"optimizer": "random", "search": {"racing": False}},
    "pareto": {
        "optimizer": "llm-off",
        "search": {"objective": "pareto"},
        "tasks": ["letters", "letters_heldout"],
        "heldout": [],
    },
    "constraints": {"optimizer": "llm-off", "constraints": ["letters >= parent - 0.2"]},
}


@pytest.mark.parametrize("kind", SEARCHES)
def test_a_run_is_the_same_with_any_number_of_workers(place: Place, kind: str) -> None:
    counts = (0, 1, 4) if kind == "llm-off" else (0, 3)
    logs = [place.run(f"with-{count}", alive=count, **SEARCHES[kind]) for count in counts]
    for count, log in zip(counts, logs, strict=True):
        check_whole(log, place.root / f"with-{count}")
        assert essence(log) == essence(logs[0])
    kinds = {event.event for event in logs[0]}
    assert ({"selected", "heldout"} <= kinds) == (kind != "pareto")  # there all questions are the search's
    raced = any(isinstance(event, events.Evaluated) and event.rival is not None for event in logs[0])
    assert raced == (kind not in ("not raced", "pareto"))


def test_a_run_loses_workers_at_any_time_and_is_the_same(place: Place) -> None:
    whole = place.run("whole")
    acts = {
        "greet": "exit once",
        (0, 1): "die once",
        5: "lose once",
        (6, 0): "die once",
        9: "break once",
        "held-out row one": "die once",
        "held-out row two": "lose once",
    }
    log = place.run("losing", acts=acts)
    check_whole(log, place.root / "losing")
    assert essence(log) == essence(whole)
    lost = [event for event in log if isinstance(event, events.Worker) and event.change == "lost"]
    assert {event.request for event in lost} == {None, 0, 5, 6, 9, "held-out row one", "held-out row two"}
    losses = sum(event.losses for event in log if isinstance(event, events.Scored))
    assert losses == len(lost) - 1


@pytest.mark.parametrize("order", ["strict", "steady"])
def test_a_recipe_that_kills_engines_fails_and_the_run_goes_on(place: Place, order: str) -> None:
    log = place.run("killing", acts={6: "die", 2: "fail"}, search={"order": order})
    check_whole(log, place.root / "killing")
    failed = {event.candidate: event for event in log if isinstance(event, events.Failed)}
    assert {*failed} == {2, 6}
    assert failed[6].reason.startswith("lost twice on different workers: its process died (killed by signal 9")
    lost = [event for event in log if isinstance(event, events.Worker) and (event.change, event.request) == ("lost", 6)]
    assert failed[6].losses == len(lost) >= 2  # two at the same time count as one
    assert failed[2].reason == "2 is no model"


@pytest.mark.parametrize("order", ["strict", "steady"])
def test_a_machine_that_is_ill_stops_the_run_which_goes_on_when_it_is_well(place: Place, order: str) -> None:
    acts = dict.fromkeys(range(6, 16), "lose ill") | {"control": "lose ill"}
    (place.script("run").folder / "ill").touch()
    with pytest.raises(MachineError, match="the machine is out of memory"):
        place.run("run", acts=acts, search={"order": order})
    stopped = place.log("run")
    assert not any(isinstance(event, events.Failed) for event in stopped)
    assert sum(isinstance(event, events.Evaluated) for event in stopped) >= 4
    log = place.run("run", search={"order": order})
    assert log[: len(stopped)] == stopped
    check_whole(log, place.root / "run")
    if order == "strict":
        assert essence(log) == essence(place.run("whole"))


@pytest.mark.parametrize("order", ["strict", "steady"])
def test_a_run_goes_on_with_another_number_of_workers(place: Place, order: str) -> None:
    whole = place.run("whole", search={"order": order})
    lines = (place.root / "whole" / "events.jsonl").read_bytes().splitlines(keepends=True)
    arrivals = [number for number, event in enumerate(whole) if isinstance(event, events.Evaluated)]
    for cut, alive in ((arrivals[2], 0), (arrivals[9], 1), (arrivals[-1] + 2, 3)):
        folder = place.root / f"cut-{cut}"
        folder.mkdir()
        (folder / "events.jsonl").write_bytes(b"".join(lines[:cut]))
        log = place.run(folder.name, alive=alive, search={"order": order})
        check_whole(log, folder)
        if order == "strict":
            assert essence(log) == essence(whole)


Start = Callable[..., BaseProcess]


@pytest.fixture(scope="module")
def start() -> Generator[Start]:
    """Start a run in a process of its own, as the command line does; imports are done once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lm_eval.evaluator", "lm_eval.tasks", "optuna", "torch"])
    started: list[BaseProcess] = []

    def process(*arguments: object) -> BaseProcess:
        made = context.Process(target=scripted_run.in_child, args=arguments, daemon=False)
        made.start()
        started.append(made)
        return made

    yield process
    for each in started:
        each.kill()
        each.join()


@pytest.mark.parametrize(("number", "order"), [(signal.SIGKILL, "strict"), (signal.SIGINT, "steady")], ids=str)
def test_a_driver_that_ends_takes_its_workers_with_it_and_the_run_goes_on(
    place: Place, start: Start, number: signal.Signals, order: str
) -> None:
    config = config_in(place.root, search={"order": order})
    script = place.script("run", {"load": "child"}, seconds=0.2)  # the last worker is there before the end
    output = place.root / "output"
    driver = start(config, place.root, script, place.root / "run", output)
    assert driver.pid
    until(
        lambda: len(script.asked()) > 12 and len(script.children()) == 4, output.read_text() if output.exists() else ""
    )
    os.killpg(driver.pid, number)  # the group of a terminal, to which Ctrl-C goes
    driver.join(60)
    assert len(script.children()) == len(script.processes()) == 4
    assert_gone([*script.processes(), *script.children()])
    printed = output.read_text()
    if number == signal.SIGINT:
        assert driver.exitcode == 130, printed
        assert printed.rstrip().endswith(f"Stopped. Nothing is lost: `llmevo resume {place.root / 'run'}` goes on.")
        assert "Traceback" not in printed
    stopped = place.log("run")
    assert not any(isinstance(event, events.RunFinished) for event in stopped)
    log = place.run("run", search={"order": order})
    assert log[: len(stopped)] == stopped
    check_whole(log, place.root / "run")
    if order == "strict":
        assert essence(log) == essence(place.run("whole"))


PREPARED = {
    "base_model": "base",
    "models": ["one", "two"],
    "merge_method": "task_arithmetic",
    "layer_granularity": 1,
    "prepare": ["regmean"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "more"),
    [
        ("llm", {}),
        ("llm-off", {"gate": True, "constraints": ["letters >= parent - 0.5"]}),
        ("llm-off", {"genome": PREPARED}),
    ],
    ids=str,
)
def test_engines_in_workers_score_alike(
    workspace: Workspace, optimizer: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In workers, and the same run from its beginning in this process; for one of them with another number of workers
    too.
    """
    monkeypatch.setenv("LLMEVO_HOME", str(workspace.root / "cache"))
    write_task(workspace.root, "letters", 0, size=24)
    again = [(2, "processes"), (1, None)] if optimizer == "llm" else [(1, None)]
    engine = {"backend": "hf", "device": "cpu", "workers": 1 + again[0][0], "on": "processes"}
    search = {"optimizer": optimizer, "budget": 14, "population": 4, "seed": 3, "order": "strict"}
    config = {
        "engine": engine,
        "search": {**search, "racing": {"looks": 3}},
        "llm": {"proposer": "simulated", "model": "random"},
    }
    status, printed = workspace.llmevo("run", workspace.config(**config, **more), "--out", "run")
    assert status == 0, printed
    whole, lines = workspace.events("run"), (workspace.root / "run" / "events.jsonl").read_bytes().splitlines(True)
    for workers, on in again:
        folder = workspace.root / f"again-{workers}-{on}"
        folder.mkdir()
        (folder / "events.jsonl").write_bytes(lines[0])
        trust(folder)
        with RunLog(folder, resume=True) as log:
            experiment = prepare(log)
            changed = experiment.config.engine.model_copy(update={"workers": workers, "on": on})
            experiment.scorer.config = experiment.config.model_copy(update={"engine": changed})
            assert experiment.scorer.workers.count == workers
            carry_on(experiment, log)
        assert essence(read_log(folder)) == essence(whole)
    if optimizer == "llm":
        status, printed = workspace.llmevo("replay", "again-2-processes", "--verify")
        assert status == 0, printed
    scored = [event for event in whole if isinstance(event, events.Evaluated)]
    assert any(event.rival is not None for event in scored) or more
    prepared = "genome" in more  # by one of the workers, for all of them
    assert len([*(workspace.root / "cache").glob("prepared/*")]) == prepared
    assert ["prepare" in event.seconds for event in scored].count(True) == prepared


class Closing(Local):
    """Workers of which it is known whether they were ended."""

    closed = False

    def close(self) -> None:
        self.closed = True


def test_a_resumed_run_ends_its_workers(workspace: Workspace) -> None:
    workspace.finished(search={"optimizer": "random", "budget": 5, "seed": 3}, heldout=None)
    workers = Closing(lambda _: pytest.fail("nothing is left to score"))
    with RunLog(Path("run"), resume=True) as log:
        experiment = prepare(log)
        experiment.scorer.workers = workers
        carry_on(experiment, log)
    assert workers.closed


@pytest.mark.slow
def test_engines_that_are_killed_at_any_moment_change_nothing(workspace: Workspace) -> None:
    write_task(workspace.root, "letters", 0, size=24)
    engine = {"backend": "hf", "device": "cpu", "workers": 2, "self_check": False}
    options = {"optimizer": "cma-es", "budget": 24, "population": 6, "seed": 3, "racing": {"looks": 3}}
    workspace.config(engine=engine, search=options)
    assert workspace.llmevo("run", "config.yml", "--out", "whole")[0] == 0
    killer = Killer(5)
    killer.start()
    status, printed = workspace.llmevo("run", "config.yml", "--out", "losing")
    killer.stop()
    assert status == 0, printed
    log = workspace.events("losing")
    assert essence(log) == essence(workspace.events("whole"))
    lost = sum(isinstance(event, events.Worker) and event.change == "lost" for event in log)
    assert 1 <= lost <= len(killer.killed)  # the log does not have those that were killed after the last score
    assert killer.killed
    assert verify(log, workspace.root / "losing")
