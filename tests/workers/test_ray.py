"""Workers on a Ray cluster of this machine, some of whose machines come and go."""

import importlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llmevo.errors import ConfigError, UserError
from llmevo.run.log import events
from llmevo.workers.pool import Pool
from llmevo.workers.protocol import Request, Result
from llmevo.workers.ray import ATTEMPTS, RayCluster, check_cluster, excerpt
from support.ray_cluster import MARKS, MEMORY, new_cluster
from support.scripted import FACTS, Script, ScriptedScoring, recipe_of, whole_score
from support.workers import PATIENCE, Watched, assert_gone, is_alive, until
from support.workspace import Workspace

pytestmark = [*MARKS]

CLIENTS = 23987
"""The port for ray:// of the cluster."""


@pytest.fixture(scope="module")
def cluster() -> Generator[Any]:
    """A cluster of one machine with two cores and two GPUs that Ray believes in; tests add others."""
    made = new_cluster(num_cpus=2, num_gpus=2, ray_client_server_port=CLIENTS)
    try:
        until(lambda: socket.socket().connect_ex(("127.0.0.1", CLIENTS)) == 0, "the port for clients is not open")
        yield made
    finally:
        made.shutdown()


@contextmanager
def machine(cluster: Any, cpus: int = 1, gpus: int = 1) -> Generator[Any]:
    """One more machine in the cluster, for a while."""
    added = cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=MEMORY)
    try:
        yield added
    finally:
        if added in cluster.worker_nodes:
            cluster.remove_node(added)


@dataclass
class OnRay(Watched):
    """A pool of scripted workers on Ray."""

    host: RayCluster = field(kw_only=True)

    def submit(self, *numbers: int) -> None:
        for number in numbers:
            self.pool.submit(Request(number, recipe_of(number)))

    def results(self, count: int) -> dict[int | str, Result]:
        """The next results; each has the score that its recipe has anywhere."""
        found = [self.pool.result() for _ in range(count)]
        for result in found:
            assert result.score == whole_score(Request(result.id, recipe_of(int(result.id)))), result
        assert len({result.id for result in found}) == count
        return {result.id: result for result in found}

    def scores(self, *numbers: int) -> dict[int | str, Result]:
        self.submit(*numbers)
        return self.results(len(numbers))

    @property
    def ready(self) -> int:
        return sum(slot.is_ready for slot in self.pool.slots)


@contextmanager
def on_ray(
    script: Script, most: int, address: str | None, least: int | None = None, gpus: float | None = None
) -> Generator[OnRay]:
    """So many workers; none of their processes may be left in the end."""
    host = RayCluster(script.scorer_factory(), least, most, address, gpus)
    on = OnRay(Pool(host, ScriptedScoring(), FACTS), script, host=host)
    on.pool.observe = on.notices.append
    try:
        yield on
    finally:
        on.pool.close()
        assert_gone(script.processes())


def environment_of(process: int) -> dict[str, str]:
    pairs = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


# Scoring


def test_each_worker_has_a_gpu_and_a_share_of_the_cores(cluster: Any, tmp_path: Path) -> None:
    script = Script(tmp_path, seconds=0.05)
    with on_ray(script, 2, cluster.address) as on:
        asked = 0
        while len(on.changes("ready")) < 2:  # one may begin late
            on.scores(*range(asked + 1, asked + 7))
            asked += 6
            assert asked < 10_000
        assert sorted(notice.place.rpartition(", ")[2] for notice in on.changes("ready")) == ["GPU 0", "GPU 1"]
        workers = [environment_of(process) for process in script.processes()]
        assert [each["OMP_NUM_THREADS"] for each in workers] == ["1", "1"]
    assert len(script.asked()) == asked * 3  # nothing is repeated


def test_an_engine_may_have_several_gpus(cluster: Any, tmp_path: Path) -> None:
    script = Script(tmp_path)
    with on_ray(script, 1, cluster.address, gpus=2.0) as on:
        on.scores(1)
        assert on.changes("ready")[0].place.endswith("GPU 0,1")
        assert environment_of(script.processes()[0])["OMP_NUM_THREADS"] == "2"


@pytest.mark.usefixtures("cluster")
def test_through_the_port_for_clients(tmp_path: Path) -> None:
    script = Script(tmp_path, {2: "die once"})
    with on_ray(script, 2, f"ray://127.0.0.1:{CLIENTS}") as on:
        assert on.scores(1, 2, 3)[2].losses == 1


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("failures", [1, ATTEMPTS])
def test_a_server_for_the_client_that_does_not_start_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    client = importlib.import_module("ray.util.client.worker").Worker
    connect, tries = client._server_init, itertools.count(1)

    def unreliable(self: Any, *arguments: Any, **options: Any) -> None:
        if next(tries) <= failures:
            raise ConnectionAbortedError("Initialization failure from server:\nStarting Ray client server failed.")
        connect(self, *arguments, **options)

    monkeypatch.setattr(client, "_server_init", unreliable)
    if failures < ATTEMPTS:
        with on_ray(Script(tmp_path), 1, f"ray://127.0.0.1:{CLIENTS}") as on:
            on.scores(1)
    else:
        with pytest.raises(ConfigError, match=r"Ray does not connect to ray://.*Starting Ray client server failed"):
            RayCluster(Script(tmp_path).scorer_factory(), None, 1, f"ray://127.0.0.1:{CLIENTS}", None)
    assert next(tries) >= failures + (2 if failures < ATTEMPTS else 1)  # on a busy machine it does fail, too


# Losses


def test_a_worker_that_is_killed_loses_nothing(cluster: Any, tmp_path: Path) -> None:
    script = Script(tmp_path, {(3, 1): "die once"}, seconds=0.05)
    with on_ray(script, 2, cluster.address) as on:
        results = on.scores(1, 2, 3, 4)
        assert results[3].losses == 1
        (lost,) = on.changes("lost")
        assert lost.request == 3
        assert lost.reason.startswith("its process died")
        until(lambda: on.ready == 2)


def test_the_death_of_an_idle_worker_is_noticed(cluster: Any, tmp_path: Path) -> None:
    script = Script(tmp_path, {"load": "child"})
    with on_ray(script, 2, cluster.address) as on:
        on.scores(1, 2)
        until(lambda: on.ready == 2)
        first, engine = next((process, int(words[1])) for process, words in script.lines() if words[0] == "child")
        os.kill(first, signal.SIGKILL)
        until(lambda: len(script.processes()) == 3, "no worker takes its place")
        until(lambda: not is_alive(engine), "the process of its engine is left")
        until(lambda: on.ready == 2)
    until(lambda: not any(map(is_alive, script.children())), "the process of an engine is left")


def test_a_machine_that_leaves_takes_its_workers_and_a_new_one_gets_others(cluster: Any, tmp_path: Path) -> None:
    script = Script(tmp_path, seconds=0.2)
    with machine(cluster, cpus=2, gpus=2) as first, on_ray(script, 4, cluster.address) as on:
        until(lambda: on.ready == 4)
        on.submit(*range(1, 13))
        until(lambda: len(script.asked()) > 6)
        cluster.remove_node(first)
        results = on.results(12)
        lost = on.changes("lost")
        assert len(lost) == 2
        assert {notice.reason.split(" (")[0] for notice in lost} == {"its machine left the cluster"}
        assert sum(result.losses for result in results.values()) == 2
        assert on.ready == 2
        assert "no room for 2 of 4 workers: each needs 1 GPU and 1 CPU on one machine" in on.host.shortage()
        with machine(cluster, cpus=2, gpus=2):
            until(lambda: on.ready == 4)
            on.scores(*range(20, 28))
            assert not on.host.shortage()


def test_a_run_begins_with_few_workers_and_grows_with_the_cluster(cluster: Any, tmp_path: Path) -> None:
    script = Script(tmp_path)
    with on_ray(script, 4, cluster.address, least=2) as on:
        on.scores(1, 2, 3)
        assert on.ready == 2
        assert on.host.shortage() == (
            "engine.workers: the cluster has no room for 2 of 4 workers: each needs 1 GPU and 1 CPU on one machine; its"
            " 1 machine has 2 GPUs (0 free) and 2 CPUs (0 free)"
        )
        with machine(cluster):
            until(lambda: on.ready == 3)
            on.scores(*range(10, 20))


# Errors


def test_workers_that_differ_or_cannot_see_the_models_are_refused(cluster: Any, tmp_path: Path) -> None:
    for act, reason in (("differ", "dtype is other there"), ("refuse", "org/none cannot be found")):
        folder = tmp_path / act
        folder.mkdir()
        with on_ray(Script(folder, {"greet": act}), 2, cluster.address) as on:
            on.submit(1)
            with pytest.raises(UserError, match=reason):
                on.pool.result()


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ((None, 3, 1.0), "3 workers with 1 GPU each do not fit on the cluster, whose machine has 2 GPUs; give at most"),
        (
            (None, 3, None),
            "3 workers with 1 GPU each do not fit on the cluster, whose machine has 2 GPUs; give at most",
        ),
        ((None, 1, 3.0), "a worker needs 3 GPUs of one machine, but the cluster's machine has 2 GPUs"),
    ],
)
def test_more_workers_than_the_cluster_can_hold(cluster: Any, workers: Any, message: str) -> None:
    least, most, gpus = workers
    with pytest.raises(ConfigError, match=message):
        check_cluster(least, most, cluster.address, gpus)
    check_cluster(1, most, cluster.address, gpus)  # other machines may come


def test_more_workers_than_cores(tmp_path: Path) -> None:
    made = new_cluster(num_cpus=1)
    try:
        with pytest.raises(ConfigError, match="2 workers do not fit on the cluster, whose machine has 1 CPU; give at"):
            check_cluster(None, 2, made.address, None)
        with on_ray(Script(tmp_path), 2, made.address, least=1) as on:
            on.scores(1)
            assert "for 1 of 2 workers: each needs 1 CPU on one machine" in until(on.host.shortage)
    finally:
        made.shutdown()


def test_another_version(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("ray"), "__version__", "2.0.0")
    with pytest.raises(ConfigError, match=r"has another version of Ray or Python: .*Ray: 2\.0\.0"):
        check_cluster(None, 1, cluster.address, None)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    port, started = free_port(), time.monotonic()
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "ray://no-such-host:10001"):
        with pytest.raises(ConfigError, match=f"there is no Ray cluster at {address}"):
            check_cluster(None, 1, address, None)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match=rf"there is no Ray cluster at auto \(127.0.0.1:{port}\)"):
        check_cluster(None, 1, "auto", None)
    monkeypatch.delenv("RAY_ADDRESS")

    def find(_: str) -> str:
        raise ConnectionError("Could not find any running Ray instance.")

    services = importlib.import_module("ray._private.services")
    monkeypatch.setattr(services, "canonicalize_bootstrap_address_or_die", find)
    with pytest.raises(ConfigError, match="auto finds no Ray cluster that this machine belongs to; start one with"):
        check_cluster(None, 1, "auto", None)
    assert time.monotonic() < started + 10


def test_ray_is_not_installed(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    workspace.config(engine={"on": "ray", "workers": 2})
    status, printed = workspace.llmevo("run", "config.yml", "--out", "run")
    assert status == 2
    assert "install it with `pip install '.[ray]'` in the clone" in printed
    assert not Path("run").exists()


def test_a_program_that_uses_ray_itself(cluster: Any, tmp_path: Path) -> None:
    ray = importlib.import_module("ray")
    ray.init(cluster.address, log_to_driver=False)
    try:
        with pytest.raises(ConfigError, match="this program is connected to a Ray cluster already"):
            check_cluster(None, 1, cluster.address, None)
        with on_ray(Script(tmp_path), 1, "auto") as on:
            on.scores(1)
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_reasons_are_one_line_without_control_characters() -> None:
    text = (
        "\x1b[36mray::A()\x1b[39m failed\n\tpid: 1\nThe actor died because its\x07 worker\nstopped. Some common causes"
    )
    assert excerpt(RuntimeError(text)) == "its worker stopped."
    assert len(excerpt(RuntimeError("long " * 1000))) < 400


# A new cluster


DRIVER = """
import sys
from pathlib import Path
from llmevo.workers.pool import Pool
from llmevo.workers.ray import RayCluster
from support.scripted import *

script = Script(Path(sys.argv[1]), {2: "die once", 3: "hang"})
pool = Pool(RayCluster(script.scorer_factory(), None, 2, *sys.argv[3:]), ScriptedScoring(), FACTS)
for number in (1, 2):
    pool.submit(Request(number, recipe_of(number)))
for _ in range(2):
    print(pool.result().id, flush=True)
if sys.argv[2] == "close":
    pool.close()
    print("closed", flush=True)
    sys.stdin.read()
pool.submit(Request(3, recipe_of(3)))
try:
    pool.result()
except MachineError as error:
    print(error, flush=True)
pool.close()
"""

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes of Ray that need a minute to end when it is killed."""


@pytest.mark.parametrize("end", ["close", "kill", "stop"])
def test_a_new_cluster_ends_with_its_driver(tmp_path: Path, end: str) -> None:
    mark = f"LLMEVO_TEST={tmp_path}"
    other = {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"}  # it is for other programs
    variables = {**os.environ, **other, "LLMEVO_TEST": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", DRIVER, str(tmp_path), end]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=variables, **pipes) as driver:
        assert driver.stdout
        assert {driver.stdout.readline(), driver.stdout.readline()} == {"1\n", "2\n"}
        if end == "close":
            assert driver.stdout.readline() == "closed\n"
            until(lambda: len([*marked_with(mark)]) == 1, "a process of the cluster is left")
            driver.kill()
        else:
            assert any("raylet" in command for command in marked_with(mark))
            assert not any(
                "dashboard.py" in command and "--include-dash=true" in command for command in marked_with(mark)
            )
            driver.kill() if end == "kill" else driver.terminate()
        assert driver.communicate() == ("", "")
        assert driver.returncode == (-signal.SIGTERM if end == "stop" else -signal.SIGKILL)
    until(lambda: not {*marked_with(mark)} - {*AGENTS}, "a process of the cluster is left")


def test_a_cluster_that_is_lost_ends_the_session(tmp_path: Path) -> None:
    cluster = new_cluster(num_cpus=2)
    address, script = cluster.address, Script(tmp_path)
    command = [sys.executable, "-c", DRIVER, str(tmp_path), "lose", address]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as driver:
            until(lambda: ("3", 0) in script.asked())
            cluster.remove_node(cluster.head_node, allow_graceful=False)
            printed, _ = driver.communicate(timeout=PATIENCE)
    finally:
        cluster.shutdown()
    assert printed.splitlines()[-1] == (f"the Ray cluster at {address} is lost; resume the run when it is there again")
    assert_gone(script.processes())


def marked_with(mark: str) -> Iterable[str]:
    """The commands of the processes with an environment variable."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                yield (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


# Runs


def facts_of(run: list[events.Event]) -> dict[str, Any]:
    """What two runs that differ only in where they were scored have in common."""
    lines = [event.model_dump() for event in run if not isinstance(event, events.Worker)]
    lines.sort(key=lambda line: line.get("candidate") or 0 if line["event"] in ("evaluated", "failed") else -1)
    return {"lines": [without_places(line) for line in lines]}


def without_places(line: Mapping[str, Any]) -> dict[str, Any]:
    left = {key: value for key, value in line.items() if key not in ("time", "at", "seconds", "workers", "losses")}
    if left["event"] == "run_started":
        left["config"] = {key: value for key, value in left["config"].items() if key != "engine"}
    return left


def test_a_run_on_ray_is_that_on_processes(cluster: Any, workspace: Workspace) -> None:
    search = {"optimizer": "cma-es", "budget": 9, "population": 4, "seed": 3}
    for out, engine in (
        ("here", {"on": "processes", "workers": 2}),
        ("there", {"on": "ray", "workers": 2, "address": cluster.address}),
    ):
        workspace.config(engine=engine, search=search)
        status, printed = workspace.llmevo("run", "config.yml", "--out", out)
        assert status == 0, printed
        assert "raylet" not in printed
    assert facts_of(workspace.events("here")) == facts_of(workspace.events("there"))
    workers = [event.workers for event in workspace.events("there") if isinstance(event, events.Evaluated)]
    assert {name for each in workers for name in each} <= {"1", "2"}
    assert any(workers)
    status, printed = workspace.llmevo("replay", "there", "--verify")
    assert status == 0, printed
