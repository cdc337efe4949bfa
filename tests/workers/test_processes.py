"""Worker processes of this machine: what they are given, what they say when they die, and what they import."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmevo.errors import ConfigError, MachineError
from llmevo.workers import start
from llmevo.workers.processes import Processes, fitting
from llmevo.workers.protocol import Job, Lost
from support.scripted import Script, recipe_of
from support.workers import assert_gone, pool_on, requests_for, until


def test_a_worker_imports_no_library_that_scores() -> None:
    code = (
        "import sys, pkgutil, importlib, llmevo.workers as room\n"
        "for each in pkgutil.iter_modules(room.__path__): importlib.import_module(f'{room.__name__}.{each.name}')\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'ray', 'scipy'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_worker_that_cannot_import_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('libcublas.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pool_on("processes", Script(tmp_path), count=1) as watched:
        watched.pool.submit(requests_for(1)[0])
        with pytest.raises(
            MachineError, match=r"did not start twice: .*exit status 1; .*libcublas\.so\.12: cannot open"
        ):
            watched.pool.result()


def test_a_worker_finds_modules_where_its_run_does_and_not_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('a file of the user')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    with pool_on("processes", Script(tmp_path), count=1) as watched:
        assert watched.score(requests_for(1))[1].score


def test_what_a_worker_prints_is_read_away_and_its_end_is_kept(tmp_path: Path) -> None:
    script = Script(tmp_path, {1: "chatter once"})
    with pool_on("processes", script, count=1) as watched:
        assert watched.score(requests_for(1))[1].losses == 1
    (lost,) = watched.changes("lost")
    assert lost.reason.endswith("the scripted worker leaves)")
    assert "exit status 3" in lost.reason
    assert len(lost.reason) < 600


def test_workers_outlive_ctrl_c_and_not_their_run(tmp_path: Path) -> None:
    host = Processes(Script(tmp_path).scorer_factory(), 1)
    worker = host.launch("1")
    try:
        assert host.wait([worker], 60)
        worker.receive()
        (process,) = Script(tmp_path).processes()
        assert os.getsid(process) == process
        os.kill(process, signal.SIGINT)
        worker.begin()
        assert host.wait([worker], 60)
        worker.receive()
        worker.pipe.close()  # as the system does when the run is killed
        assert_gone([process])
    finally:
        worker.kill()
        host.close()


def test_a_dead_worker_can_be_given_work(tmp_path: Path) -> None:
    host = Processes(Script(tmp_path).scorer_factory(), 1)
    worker = host.launch("1")
    assert host.wait([worker], 60)
    worker.receive()
    os.kill(Script(tmp_path).processes()[0], signal.SIGKILL)
    until(lambda: host.wait([worker], 1))
    worker.begin()
    worker.send(Job(1, recipe_of(1), "search", 0))
    assert isinstance(worker.receive(), Lost)
    worker.kill()
    worker.kill()
    host.close()


def environments(count: int, devices: list[str], each: float) -> list[dict[str, str]]:
    host = Processes(lambda: None, count, devices, each)  # pyright: ignore[reportArgumentType]
    host.close()
    return [host.environment(place) for place in range(count)]


@pytest.mark.parametrize(
    ("each", "wanted"),
    [
        (1.0, ["0", "1", "2", "3"]),
        (2.0, ["0,1", "2,3"]),
        (0.5, ["0", "0", "1", "1", "2", "2", "3", "3"]),
        (0.3, ["0", "0", "0", "1", "1", "1", "2", "2", "2", "3", "3", "3"]),
        (1 / 3, ["0", "0", "0", "1", "1", "1", "2", "2", "2", "3", "3", "3"]),
        (0.7, ["0", "1", "2", "3"]),
    ],
)
def test_every_worker_has_gpus_of_its_own_or_a_share_of_one(each: float, wanted: list[str]) -> None:
    assert fitting(4, each) == len(wanted)
    found = environments(len(wanted), ["0", "1", "2", "3"], each)
    assert found == [{"CUDA_VISIBLE_DEVICES": devices} for devices in wanted]


def test_workers_without_gpus_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(6)}, raising=False)
    for count, threads in ((1, "6"), (2, "3"), (4, "1"), (9, "1")):
        assert environments(count, [], 1.0) == count * [{"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}]


def test_more_workers_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    host: Any = start._host(lambda: None, 2, 1, "processes", None, 1.0)  # pyright: ignore
    assert host.environment(1) == {"CUDA_VISIBLE_DEVICES": "GPU-5"}
    host.close()
    for count, each, fits in ((3, 1.0, 2), (7, 0.3, 6), (2, 2.0, 1)):
        with pytest.raises(
            ConfigError, match=f"{count} workers with {each:g} GPUs each do not fit on 2 GPUs; give at most {fits}"
        ):
            start._host(lambda: None, count, 1, "processes", None, each)  # pyright: ignore
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    host = start._host(lambda: None, 3, 1, "processes", None, 1.0)  # pyright: ignore
    assert "OMP_NUM_THREADS" in host.environment(2)
    host.close()
