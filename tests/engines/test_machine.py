"""A failure of the machine stops the run, which goes on later; a failure of a candidate costs that candidate."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from requests.exceptions import ConnectionError as LostServer

from llmevo.engines.hf import HfEngine
from llmevo.engines.scoring.hf import HfScorer
from llmevo.engines.vllm import VllmEngine
from llmevo.engines.vllm_worker import Merging
from llmevo.errors import CandidateError, MachineError, machine_error
from llmevo.merging.merger import Merger
from llmevo.merging.recipe import Recipe
from llmevo.models.references import ModelReference
from llmevo.models.sources import Sources
from llmevo.run.log import events
from support.workspace import Workspace


class EngineDeadError(Exception):
    """As vLLM's."""


NO_MEMORY = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: 12 bytes"

FAULTS: dict[str, Exception] = {
    "GPU memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "memory": MemoryError("Unable to allocate 2.00 GiB for an array"),
    "torch's CPU memory": RuntimeError(NO_MEMORY),
    "a CUDA error": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "a dead engine": EngineDeadError("EngineCore encountered an issue."),
    "a dead worker": Exception("Call to collective_rpc method failed: Executor failed."),
    "a lost mount": OSError(errno.EIO, "Input/output error", "model.safetensors"),
    "a vanished file": FileNotFoundError(errno.ENOENT, "No such file or directory", "model.safetensors"),
    "a lost network": ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    "a lost server": LostServer("Max retries exceeded"),
    "a lost hub": httpx.ConnectError("Name or service not known"),
}
each_fault = pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)


def failing(method: Callable[..., Any], first: int, last: int, fault: Exception) -> Callable[..., Any]:
    """The method, with calls `first` to `last` failing."""
    calls = 0

    def call(self: Any, *given: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if first <= calls <= last:
            raise fault
        return method(self, *given, **options)

    return call


def config(workspace: Workspace, **changes: Any) -> Path:
    search = {"optimizer": "cma-es", "budget": 8, "seed": 3}
    return workspace.config(search=search, llm=None, heldout=None, engine={"self_check": False}, **changes)


WHERE: list[tuple[Any, str, str]] = [
    *((HfEngine, "swap", name) for name in FAULTS),
    *((HfScorer, "loglikelihood", name) for name in ("torch's CPU memory", "a dead engine", "a vanished file")),
]


@pytest.mark.parametrize(("owner", "method", "name"), WHERE, ids=lambda part: part if isinstance(part, str) else "")
def test_a_fault_of_the_machine_stops_the_run_and_costs_no_candidate(
    workspace: Workspace, owner: Any, method: str, name: str
) -> None:
    fault = FAULTS[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, failing(getattr(owner, method), 5, 99, fault))
        status, printed = workspace.llmevo("run", config(workspace), "--out", "run")
    assert status == 1, printed
    assert "Traceback" not in printed
    assert str(fault).splitlines()[0][:40] in " ".join(printed.split())
    assert "`llmevo resume run` goes on" in printed
    before = workspace.events("run")
    scored = sum(isinstance(event, events.Evaluated) for event in before)
    assert f"candidate {scored}: " in printed
    assert not any(isinstance(event, events.Failed) for event in before)
    status, printed = workspace.llmevo("resume", "run")
    assert status == 0, printed
    state = workspace.state("run")
    assert workspace.events("run")[: len(before)] == before
    assert len(state.trials) == 8
    assert all(trial.score for trial in state.trials.values())


@pytest.mark.parametrize("fault", ["GPU memory", "torch's CPU memory", "a dead engine"])
def test_what_may_pass_is_tried_once_more_and_a_dead_engine_is_started_anew(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    started: list[object] = []
    start = HfEngine.__init__

    def begin(self: HfEngine, *given: Any) -> None:
        started.append(self)
        start(self, *given)

    monkeypatch.setattr(HfEngine, "__init__", begin)
    monkeypatch.setattr(HfEngine, "swap", failing(HfEngine.swap, 5, 5, FAULTS[fault]))
    status, printed = workspace.llmevo("run", config(workspace), "--out", "run")
    assert status == 0, printed
    assert "tried once more" in printed
    assert len(started) == (2 if fault == "a dead engine" else 1)
    assert all(trial.score for trial in workspace.state("run").trials.values())


def test_an_engine_that_does_not_start_again_stops_the_run(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = failing(HfEngine.__init__, 2, 2, torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(HfEngine, "__init__", start)
    monkeypatch.setattr(HfEngine, "swap", failing(HfEngine.swap, 5, 5, FAULTS["a dead engine"]))
    status, printed = workspace.llmevo("run", config(workspace), "--out", "run")
    assert status == 1, printed
    assert "out of memory" in printed
    assert "`llmevo resume run` goes on" in printed


@each_fault
def test_a_fault_is_told_with_its_own_words_and_what_to_do(fault: Exception) -> None:
    found = machine_error(fault)
    assert found is not None
    assert type(fault).__name__ in str(found)
    assert found.kind in ("memory", "device", "engine", "network", "files")


@pytest.mark.parametrize(
    "error",
    [ValueError("out of memory"), RuntimeError("shape mismatch"), KeyError("file"), TimeoutError("two seconds")],
    ids=repr,
)
def test_other_errors_may_be_the_candidates(error: Exception) -> None:
    assert machine_error(error) is None


class Runner:
    """vLLM's side of a worker, as far as loading goes."""

    def get_model(self) -> torch.nn.Module:
        return torch.nn.Module()

    def reload_weights(self, weights_iterator: Iterator[Any]) -> None:
        for _ in weights_iterator:
            pass


class Llm:
    """vLLM's side of an engine with that worker in this process."""

    def __init__(self, merging: Merging) -> None:
        self.merging = merging

    def collective_rpc(self, method: str, args: Any) -> list[Any]:
        return [self.merging.swap(Recipe.model_validate(args[0]), args[1])]

    def reset_prefix_cache(self) -> bool:
        return True


def test_a_lost_file_in_a_worker_of_vllm_is_no_fault_of_the_candidate(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    merger = Merger(Sources(workspace.root))
    engine: Any = VllmEngine.__new__(VllmEngine)
    engine._llm = Llm(Merging(Runner(), workspace.root / "base", merger))
    recipe = Recipe.of_one(ModelReference.parse("one"))
    engine.swap(recipe)
    for error, raised in ((FAULTS["a lost mount"], MachineError), (ValueError("no"), CandidateError)):
        engine._llm.merging.loaded.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Merger, "merge", failing(Merger.merge, 1, 1, error))
            with pytest.raises(raised, match=str(error.args[-1])[:10]):
                engine.swap(recipe)
    engine.swap(recipe)
