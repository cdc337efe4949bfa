"""Workers as actors of a Ray cluster, whose machines may come and go. Needs the extra `llmevo[ray]`.

Ray places the workers, says when one is lost, and carries recipes and scores. It repeats nothing and holds no weights.
"""

import ctypes
import importlib
import os
import pickle
import queue
import re
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from llmevo.errors import ConfigError, MachineError, plural
from llmevo.workers.devices import cores, visible_gpus
from llmevo.workers.protocol import Job, Lost, Message, ScorerFactory
from llmevo.workers.service import Service

PROBE = 5.0
"""Seconds in which a machine has to accept a connection."""
CONNECTING = 60.0
"""Seconds in which Ray has to start, or to connect."""
ATTEMPTS = 5
"""Times to connect through a cluster's port for clients, where Ray forks a process for each client from one that has
threads: that fails now and then, and Ray does not try again."""
LOOK = 2.0
"""Seconds between two looks at whether an idle worker lives."""
STORE = 100 * 2**20
"""Bytes of a new cluster's object store: recipes and scores need few."""

EXCERPT = 300
"""Characters of Ray's reason for a loss that are shown."""

LOSSES = {
    "NodeDiedError": "its machine left the cluster",
    "OutOfMemoryError": "Ray ended it, for its machine was out of memory",
    "ActorUnavailableError": "its machine cannot be reached",
    "RuntimeEnvSetupError": "its environment cannot be set up",
    "ConnectionError": "the connection to the cluster is lost",
}
"""Reasons for a loss by the class of Ray's error."""

PASSED = re.compile("HF_HUB_OFFLINE|TRANSFORMERS_VERBOSITY|VLLM_(?!.*(KEY|TOKEN)).*")
"""Environment variables that workers on other machines get from this one. No keys."""

Resources = Mapping[str, float]
"""`CPU` and `GPU` of a machine of the cluster, among others."""


class Actor:
    """What runs in a worker's process. Ray calls its methods one after the other."""

    def __init__(self, scorer_factory: bytes) -> None:
        self._service = Service(lambda: pickle.loads(scorer_factory)())

    def live(self) -> None:
        """Answer, which says that there is a process."""

    def hello(self) -> Message:
        return self._service.hello()

    def begin(self) -> Message:
        return self._service.begin()

    def answer(self, job: Job) -> Message:
        return self._service.answer(job)


class RayWorker:
    """One actor, as the pool sees it."""

    def __init__(self, name: str, actor: Any, end: Callable[[], None], arrived: Callable[[Any], None]) -> None:
        """`arrived` is called in a thread of Ray's with what ends a wait: (worker, method, its future)."""
        self.name = name
        self.is_waiting = True
        """The cluster has no room for it yet."""
        self.messages = deque[Message]()
        self._actor, self._end, self._arrived = actor, end, arrived
        self._open, self._looked = 0, 0.0
        self._call("live")

    def begin(self) -> None:
        self._call("begin")

    def send(self, job: Job) -> None:
        self._call("answer", job)

    def receive(self) -> Message:
        return self.messages.popleft()

    def kill(self) -> None:
        self.is_waiting = False
        with suppress(Exception):  # it, or the cluster, is gone
            self._end()

    def look(self) -> None:
        """Ask an idle worker whether it lives: Ray reports a death only to those who wait for an answer."""
        if not self._open and time.monotonic() > self._looked + LOOK:
            self._call("live")

    def take(self, method: str, outcome: "Future[Any]") -> None:
        """Take what a method returned or raised."""
        self._open, self._looked = self._open - 1, time.monotonic()
        if error := outcome.exception():
            self.messages.append(loss_of(error))
        elif method == "live":
            if self.is_waiting:
                self.is_waiting = False
                self._call("hello")
        else:
            self.messages.append(outcome.result())

    def _call(self, method: str, *given: Any) -> None:
        self._open += 1
        try:
            future: Future[Any] = getattr(self._actor, method).remote(*given).future()
        except Exception as error:  # the connection to the cluster is lost
            future = Future()
            future.set_exception(error)
        future.add_done_callback(lambda done: self._arrived((self, method, done)))


class RayCluster:
    """The host of workers on a Ray cluster."""

    def __init__(
        self,
        scorer_factory: ScorerFactory,
        least: int | None,
        most: int,
        address: str | None = None,
        gpus: float | None = None,
    ) -> None:
        """Ask for `most` workers. Without `least`, all must fit on the machines of the cluster; with it, those without
        room wait for more machines.

        Without `address` (or with `none`) the cluster is a new one on this machine, which ends with `close`. Each
        worker has `gpus` GPUs of one machine; None: one where the cluster has any. Raises ConfigError when Ray is not
        installed, there is no cluster at the address, or it cannot hold the workers.
        """
        self.least, self.most = least or 1, most
        self._scorer_factory = pickle.dumps(scorer_factory)
        self._arrived = queue.SimpleQueue[Any]()
        self._workers: dict[str, RayWorker] = {}
        self._connection = _Connection(address, most)
        try:
            machines = self._connection.machines()
            self._gpus = _gpus(machines, gpus)
            self._cores = _share(machines, least is not None, most, self._gpus)
        except BaseException:
            self._connection.close()
            raise
        self.one_at_a_time = 0 < self._gpus < 1
        self._ray = self._connection.ray
        self._actors: Any = self._ray.remote(max_restarts=0, max_task_retries=0)(Actor)

    def launch(self, name: str) -> RayWorker:
        threads = str(max(1, self._cores))
        passed = {key: value for key, value in os.environ.items() if PASSED.fullmatch(key)}
        environment = {**passed, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        room = {"num_cpus": self._cores, "num_gpus": self._gpus}
        actor = self._actors.options(**room, runtime_env={"env_vars": environment}).remote(self._scorer_factory)
        end = partial(self._ray.kill, actor, no_restart=True)
        self._workers[name.partition(".")[0]] = worker = RayWorker(name, actor, end, self._arrived.put)
        return worker

    def wait(self, workers: Sequence[RayWorker], seconds: float) -> Sequence[RayWorker]:
        for worker in workers:
            worker.look()
        with suppress(queue.Empty):
            found = self._arrived.get(timeout=seconds)
            while True:
                if found is not None:
                    worker, method, outcome = found
                    worker.take(method, outcome)
                found = self._arrived.get_nowait()
        found = [worker for worker in workers if worker.messages]
        if any(isinstance(worker.messages[0], Lost) for worker in found):
            self._connection.check()
        return found

    def wake(self) -> None:
        self._arrived.put(None)

    def shortage(self) -> str:
        waiting = sum(worker.is_waiting for worker in self._workers.values())
        if not waiting:
            return ""
        try:
            machines = self._connection.machines()
            free: Resources = self._ray.available_resources()
        except Exception as error:
            return f"engine.workers: the cluster cannot be reached ({excerpt(error)})"
        kinds = ("GPU", "CPU") if self._gpus else ("CPU",)
        has = " and ".join(f"{_total(machines, kind):g} {kind}s ({free.get(kind, 0):g} free)" for kind in kinds)
        each = {"GPU": self._gpus, "CPU": self._cores}
        need = " and ".join(_counted(each[kind], kind) for kind in kinds if each[kind])
        return (
            f"engine.workers: the cluster has no room for {waiting} of {plural(self.most, 'worker')}: each needs {need}"
            f" on one machine; its {plural(len(machines), 'machine')} {'has' if len(machines) == 1 else 'have'} {has}"
        )

    def close(self) -> None:
        self._connection.close()


def check_cluster(least: int | None, most: int, address: str | None, gpus: float | None) -> None:
    """Raise ConfigError where workers cannot be started so: see `RayCluster`. Leaves nothing running."""
    if _is_new(address):
        _ray()
        machines = [_here(most)]
        _share(machines, least is not None, most, _gpus(machines, gpus))
        return
    connection = _Connection(address, most)
    try:
        machines = connection.machines()
        _share(machines, least is not None, most, _gpus(machines, gpus))
    finally:
        connection.close()


def loss_of(error: BaseException) -> Lost:
    """Return what became of a worker by an error of Ray's."""
    text = excerpt(error)
    kinds = [LOSSES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in LOSSES]
    if not kinds and re.search(r"\bnode (has died|was terminated|is dead)|owner.*node", text):
        kinds = [LOSSES["NodeDiedError"]]
    return Lost(f"{kinds[0] if kinds else 'its process died'} ({text})", left=kinds == [LOSSES["NodeDiedError"]])


def excerpt(error: BaseException) -> str:
    """Return what an error of Ray's says, in one line without control characters and general advice."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1]  # the error; the rest is where it was raised
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    if found := re.search(r"The actor (?:is dead|died) because (.*)", text):
        text = found[1]
    text = re.split(r" (?:Some common causes|There are some potential|The process receives)", text)[0]
    text = re.sub(r"Worker exit type: \w+ Worker exit detail: |its worker process has died\. ", "", text)
    return (text if len(text) <= EXCERPT else f"…{text[-EXCERPT:]}") or type(error).__name__


def _ray() -> Any:
    """Ray's package. Its messages about workers, which would be printed over llmevo's own, are left out."""
    with _environment({"RAY_DEDUP_LOGS_SKIP_REGEX": "."}):
        try:
            return importlib.import_module("ray")
        except ImportError as error:
            raise ConfigError(
                f"engine.on: workers on ray need Ray ({error}); install it with `pip install '.[ray]'` in the"
                " clone of llmevo"
            ) from None


@contextmanager
def _environment(values: Mapping[str, str]) -> Generator[None]:
    """Set environment variables for a while, unless the user has."""
    ours = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


class _Connection:
    """This process's connection to a cluster, in a thread of its own.

    The system ends the processes of a new cluster with the thread that started them, whatever other threads go on.
    """

    def __init__(self, address: str | None, most: int) -> None:
        self.ray = _ray()
        self._end, self._thread = threading.Event(), None
        self._target: str | None = None
        if self.ray.is_initialized():
            if address != "auto":
                raise ConfigError(
                    "engine.address: this program is connected to a Ray cluster already, and there can be one only; use"
                    " `auto` for that one, or call ray.shutdown() before"
                )
            return
        self._target = target = _target(address)
        if target is None:
            here = _here(most)
            options = {"num_cpus": int(here["CPU"]), "num_gpus": int(here["GPU"]), "object_store_memory": STORE}
            options = {"address": "local", "include_dashboard": False, **options}
        else:
            _probe(address, target)
            options = {"address": target}
        begun = Future[None]()
        self._thread = threading.Thread(target=self._hold, args=(options, begun), name="llmevo-ray", daemon=True)
        with _signal_kept(signal.SIGTERM):
            self._thread.start()
            try:
                begun.result(CONNECTING)
            except TimeoutError:
                raise ConfigError(
                    f"engine.address: Ray does not answer within {CONNECTING:.0f} s ({target or 'a new cluster'})"
                ) from None
            except Exception as error:
                raise ConfigError(_refusal(error, target)) from error

    def _hold(self, options: Mapping[str, Any], begun: "Future[None]") -> None:
        try:
            for attempt in Retrying(
                retry=retry_if_exception_type(ConnectionAbortedError),
                stop=stop_after_attempt(ATTEMPTS),
                wait=wait_fixed(1),
                reraise=True,
            ):
                with attempt:
                    self.ray.init(**options, log_to_driver=False, logging_level="CRITICAL")
        except BaseException as error:  # it is raised in the thread that waits
            with suppress(Exception):
                self.ray.shutdown()
            begun.set_exception(error if isinstance(error, Exception) else RuntimeError(str(error)))
            return
        begun.set_result(None)
        self._end.wait()
        self.ray.shutdown()

    def machines(self) -> list[Resources]:
        """The resources of each machine of the cluster."""
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def check(self) -> None:
        """Raise MachineError when the cluster itself is lost, with the machine that it began on."""
        if self._target is None:
            return
        try:
            _probe(self._target, self._target)
        except ConfigError:
            self._thread = None  # Ray would try for a minute to say goodbye, and then end this process
            raise MachineError(
                f"the Ray cluster at {self._target} is lost; resume the run when it is there again", "network"
            ) from None

    def close(self) -> None:
        if self._thread:
            self._end.set()
            self._thread.join(CONNECTING)


@contextmanager
def _signal_kept(number: int) -> Generator[None]:
    """Give a signal its handler back: Ray's prints a stack. Python allows only its main thread to do so by `signal`."""
    get, put = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.c_int]
    put.restype, put.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    handler = get(number)
    try:
        yield
    finally:
        put(number, handler)


def _is_new(address: str | None) -> bool:
    return address in (None, "none")


def _target(address: str | None) -> str | None:
    """Where to connect to; None for a new cluster. Raises ConfigError when there is no cluster to be found."""
    if address != "auto":
        return None if _is_new(address) else address
    if found := os.environ.get("RAY_ADDRESS"):
        return found
    services = importlib.import_module("ray._private.services")
    try:
        return services.canonicalize_bootstrap_address_or_die("auto")
    except (ConnectionError, ValueError):
        raise ConfigError(
            "engine.address: auto finds no Ray cluster that this machine belongs to; start one with `ray start --head`"
            " or join one with `ray start --address=HEAD:6379`, or give ray://HEAD:10001"
        ) from None


def _probe(address: str | None, target: str) -> None:
    """Raise ConfigError unless something listens at an address. Ray itself would try for a minute, and end llmevo."""
    host, _, port = target.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PROBE).close()
    except (OSError, ValueError) as error:
        named = f"{address} ({target})" if target != address else target
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"engine.address: there is no Ray cluster at {named} ({reason})") from None


def _refusal(error: BaseException, target: str | None) -> str:
    """Say why Ray does not start or connect."""
    text = f"{excerpt(error)} {excerpt(error.__cause__) if error.__cause__ else ''}".replace("Version mismatch: ", "")
    if "The cluster was started with" in text:
        return f"engine.address: the cluster at {target} has another version of Ray or Python: {text.strip()}"
    if target is None:
        return f"engine.on: Ray does not start on this machine: {text.strip()}"
    return f"engine.address: Ray does not connect to {target}: {text.strip()}"


def _here(most: int) -> dict[str, float]:
    """The resources of this machine. Workers may share its cores, as processes do."""
    return {"CPU": float(max(cores(), most)), "GPU": float(len(visible_gpus()))}


def _gpus(machines: Sequence[Resources], gpus: float | None) -> float:
    return gpus if gpus is not None else float(_total(machines, "GPU") > 0)


def _share(machines: Sequence[Resources], elastic: bool, most: int, gpus: float) -> int:
    """Return the cores of a worker: with GPUs, its share of a machine's; without, as many as all of them can have.

    Raises ConfigError when the machines cannot hold the workers, unless others may come.
    """
    room = _room(machines, gpus, 0 if gpus else 1)
    if room < most and not elastic:
        kind = "GPU" if gpus else "CPU"
        place = "machine has" if len(machines) == 1 else f"{len(machines)} machines have"
        have = f"{place} {_counted(_total(machines, kind), kind)}"
        if not room:
            need = _counted(gpus or 1, kind)
            raise ConfigError(f"engine.workers: a worker needs {need} of one machine, but the cluster's {have}")
        each = f" with {_counted(gpus, 'GPU')} each" if gpus else ""
        raise ConfigError(
            f"engine.workers: {plural(most, 'worker')}{each} do not fit on the cluster, whose {have}; give at most"
            f" {room}, or {{min: {room}, max: {most}}} where machines will be added"
        )
    if gpus:
        having = [machine for machine in machines if _room([machine], gpus, 0)]
        return min((int(each.get("CPU", 0) // _room([each], gpus, 0)) for each in having), default=1)
    largest = int(max((machine.get("CPU", 0) for machine in machines), default=1))
    return next((share for share in range(largest, 1, -1) if _room(machines, 0, share) >= most), 1)


def _room(machines: Sequence[Resources], gpus: float, cpus: int) -> int:
    """The workers for which there is room on empty machines."""

    def fitting(machine: Resources) -> int:
        kinds = [("GPU", gpus), ("CPU", cpus)]
        return min(int(machine.get(kind, 0) / each + 1e-9) for kind, each in kinds if each)

    return sum(map(fitting, machines))


def _total(machines: Sequence[Resources], kind: str) -> float:
    return sum(machine.get(kind, 0) for machine in machines)


def _counted(number: float, kind: str) -> str:
    return f"{number:g} {kind}{'' if number == 1 else 's'}"
