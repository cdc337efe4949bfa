"""Record the golden logs that are not there yet: `python tests/golden/record.py`. What is there is never rewritten.

A golden log is a run of this version on tiny models, with a real engine. `llmevo replay --verify` has to accept it for
ever, by later versions too: where an optimizer's candidates are to change, it gets a new name, or its old behaviour
stays behind a setting that old logs do not have. To keep a log of a later version as well, add a line to RUNS.

A log has to verify on other CPUs too. Where an optimizer chooses between points of equal expected scores, the
last bits decide, which differ by BLAS and CPU. Verify a new log with several kernels of OpenBLAS before you add it:
`OPENBLAS_CORETYPE=Haswell llmevo replay FILE --verify`, then with `Prescott`, `Nehalem` and `Sandybridge`.
"""
# ruff: noqa: E402 (the tests' own modules are found once their folder is named)

import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file, save_file

from llmevo.config import Budget, parse_config
from llmevo.llm.client import Reply, Request
from llmevo.run import loop
from llmevo.run.experiment import Experiment
from llmevo.run.log.storage import LOG, RunLog
from llmevo.run.resume import prepare
from llmevo.search.simulated_llm import SimulatedClient
from support.workspace import new_workspace, write_task

SIMULATED = {"proposer": "simulated", "model": "random"}


class Speaking(SimulatedClient):
    """A simulated LLM that says all that an answer may hold, and nothing at all to every third prompt."""

    asked = 0

    def answer(self, request: Request) -> Reply:
        self.asked += 1
        if self.asked % 3 == 2:
            return Reply("I would rather not say.", self.model)
        reply = super().answer(request)
        said = json.loads(reply.text)
        forms: list[dict[str, Any]] = [
            {"depth": {"one": "0.3 + 0.4*depth", "two": "0.6 - 0.3*depth"}},
            {"move": {"from": "best", "scale": {"model": "two", "by": 0.8}}},
        ]
        said["proposals"][-1] |= {"genome": None, **forms[self.asked % 2]}
        said["beliefs"] = [
            {"model": "one", "rows": [2], "task": None, "direction": "higher", "confidence": 0.7, "why": "it is late"},
            {"model": "two", "direction": "stay", "value": 0.4, "confidence": 0.6, "why": "less is enough"},
        ]
        said["hypotheses"] = [{"claim": "one of them helps", "task": None, "better": "P1", "worse": "P2"}]
        return Reply(json.dumps(said), self.model)


def record(
    target: Path, optimizer: str, budget: int, llm: dict[str, str], more: int | None = None, **changes: Any
) -> None:
    """One run in the working folder; with `more` it goes on with that budget after. `changes`: keys of it."""
    raw: dict[str, Any] = {
        "genome": {
            "base_model": "base",
            "models": ["one", "two"],
            "merge_method": ["task_arithmetic", "ties"] if optimizer == "tpe" else "task_arithmetic",
            "layer_granularity": 1,
            "dtype": "float32",
        },
        "tasks": ["letters"],
        "heldout": ["letters_heldout"],
        "apply_chat_template": False,
        "task_search_path": ["tasks"],
        "search": {"optimizer": optimizer, "budget": budget, "population": 4, "seed": 7},
        "llm": llm,
        "engine": {"backend": "hf", "device": "cpu", "self_check": False},
        **changes,
    }
    run = Path()  # beside the models, so that no log names a folder of this machine
    for name in (LOG, "best.yml"):  # of the log before
        Path(name).unlink(missing_ok=True)
    with RunLog(run) as log:
        loop.carry_on(Experiment(parse_config(raw, "golden"), Path("..")), log)
    if more:
        with RunLog(run, resume=True) as log:
            loop.carry_on(prepare(log, budget=Budget(evaluations=more)), log)
    shutil.copyfile(run / LOG, target)


def record_speaking(target: Path) -> None:
    """A run with an LLM of more words than the simulated ones of a config have."""
    with mock.patch("llmevo.run.experiment.SimulatedClient", Speaking):
        record(target, "llm", 30, SIMULATED, limit=6)


def record_without_ties(target: Path) -> None:
    """A run whose two parents differ in their scores, on enough questions for that."""
    write_task(Path("..").resolve(), "letters", 0, size=24)
    record(target, "llm-off", 20, SIMULATED, limit=16)


def record_workers(target: Path, optimizer: str, order: str) -> None:
    """A raced run with two workers, one of which is killed. The name of this machine is left out of the log."""
    write_task(Path("..").resolve(), "letters", 0, size=24)
    search = {"optimizer": optimizer, "budget": 20, "population": 4, "seed": 7, "order": order, "racing": {"looks": 3}}
    engine = {"backend": "hf", "self_check": False, "workers": 2}
    with mock.patch("llmevo.run.loop.score_one", losing(loop.score_one)):
        record(target, optimizer, 20, {"proposer": "simulated", "model": "random"}, search=search, engine=engine)
    text = re.sub(r'("place":")[^"]*?(, process) \d+', r"\1machine\2", target.read_text())
    target.write_text(text)


def losing(score_one: Any) -> Any:
    """Kill a worker that scores, while the eighth score is waited for."""
    calls = iter(range(1000))

    def score(experiment: Experiment, *given: Any) -> Any:
        if next(calls) == 7:
            pool: Any = experiment.scorer.workers
            threading.Thread(target=kill_busy, args=(pool,), daemon=True).start()
        return score_one(experiment, *given)

    return score


def kill_busy(pool: Any) -> None:
    """Kill the next worker that has a job."""
    while not (found := [slot.worker for slot in pool.slots if slot.job and slot.worker]):
        time.sleep(0.001)
    os.kill(found[0]._process.pid, signal.SIGKILL)


def spoil(model: str) -> None:
    """Make a weight of it NaN, so that every merge with it fails."""
    file = Path("..") / model / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})


RUNS: dict[str, Callable[[Path], None]] = {
    "0.1-llm": lambda target: record(target, "llm", 20, SIMULATED),
    "0.1-llm-off": lambda target: record(target, "llm-off", 20, SIMULATED),
    "0.1-cma-es": lambda target: record(target, "cma-es", 20, SIMULATED),
    "0.1-llm-evo-merge": lambda target: record(target, "llm-evo-merge", 26, {"proposer": "local"}),
    "0.1-tpe": lambda target: record(target, "tpe", 16, SIMULATED),
    "0.1-spsa": lambda target: record(target, "spsa", 12, SIMULATED),
    "0.1-resumed": lambda target: record(target, "llm", 9, SIMULATED, more=15),
    "0.1-finalists": lambda target: record(target, "llm-off", 10, SIMULATED, more=14, limit=6),
    "0.2-cma-es": lambda target: record(target, "cma-es", 20, SIMULATED, limit=6),
    "0.2-llm": lambda target: record(target, "llm", 20, SIMULATED, limit=6),
    "0.3-llm": record_speaking,
    "0.3-llm-off": record_without_ties,
    "0.3-workers-strict": lambda target: record_workers(target, "cma-es", "strict"),
    "0.3-workers-steady": lambda target: record_workers(target, "llm-off", "steady"),
    "0.1-failures": lambda target: (spoil("two"), record(target, "llm", 12, SIMULATED))[1],
}
"""By the name of the log. The last one spoils a model."""


def main() -> None:
    """Record what is missing."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        new_workspace(Path(folder))
        run = Path(folder) / "run"
        run.mkdir()
        os.chdir(run)
        for name, make in RUNS.items():
            target = HERE / f"{name}.jsonl"
            if not target.exists():
                make(target)
                print(target.name, target.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
