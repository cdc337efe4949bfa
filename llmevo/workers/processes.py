"""Workers as processes of this machine: one a GPU, or one a share of the processor's cores. The default with several
GPUs.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from llmevo.workers.devices import cores
from llmevo.workers.protocol import Job, Lost, Message, ScorerFactory
from llmevo.workers.service import Service

EXCERPT = 400
"""Characters of a worker's last messages that are shown when it dies."""

PATIENCE = 10.0
"""Seconds that a killed process may take to end."""


class Process:
    """One worker process, with a pipe of its own."""

    is_waiting = False

    def __init__(self, name: str, scorer_factory: ScorerFactory, environment: Mapping[str, str]) -> None:
        self.name = name
        self.pipe, other = Pipe()
        # A program of its own, not a fork (a GPU cannot be shared with the parent's threads) and not `multiprocessing`,
        # which would run the user's script again. In a session of its own, so that Ctrl-C reaches the run alone. It
        # finds modules where this process does; `-P` keeps a file of the working folder from taking a library's name.
        paths = f"import sys; sys.path[:] = {[*map(str, sys.path)]!r}"
        command = [sys.executable, "-P", "-c", f"{paths}; from {__name__} import main; main({other.fileno()})"]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            pass_fds=(other.fileno(),),
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        other.close()
        self._said = b""
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self._write(scorer_factory)

    def _listen(self) -> None:
        """Keep the end of what it writes to standard error, which says why it died."""
        assert self._process.stderr
        with self._process.stderr as stream:
            while chunk := os.read(stream.fileno(), 4096):
                self._said = (self._said + chunk)[-4 * EXCERPT :]

    def _write(self, thing: Any) -> None:
        with suppress(OSError):  # it died; `receive` says so
            self.pipe.send_bytes(pickle.dumps(thing))

    def begin(self) -> None:
        self._write(None)

    def send(self, job: Job) -> None:
        self._write(job)

    def receive(self) -> Message:
        try:
            return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            return Lost(self._death())

    def _death(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._listener.join(1)
        code = self._process.returncode
        died = f"killed by signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        if code == -signal.SIGKILL:
            died += ", as the system does when memory runs out"
        said = " ".join(self._said.decode(errors="replace").split())[-EXCERPT:]
        return f"its process died ({died}{'; ' + said if said else ''})"

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its engine may have processes of its own
        with suppress(subprocess.TimeoutExpired):  # a process that waits for a lost disk ends when that comes back
            self._process.wait(PATIENCE)
        self.pipe.close()
        self._listener.join(1)


class Processes:
    """The host of worker processes."""

    def __init__(
        self,
        scorer_factory: ScorerFactory,
        count: int,
        devices: Sequence[str] = (),
        each: float = 1.0,
        threads: int | None = None,
    ) -> None:
        """Each of `count` workers has `each` of the GPUs `devices` (a whole number, or a share below 1; see `fitting`),
        or without any so many processor threads, by default an equal share of the cores.
        """
        self.least, self.most = 1, count
        self.one_at_a_time = bool(devices) and each < 1
        self._scorer_factory, self._devices, self._each = scorer_factory, [*devices], each
        self._threads = threads or max(1, cores() // count)
        self._waking, self._woken = Pipe()

    def launch(self, name: str) -> Process:
        return Process(name, self._scorer_factory, self.environment(int(name.partition(".")[0]) - 1))

    def environment(self, place: int) -> dict[str, str]:
        """Return the environment variables of the worker at a place, from 0."""
        if not self._devices:
            return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self._threads))
        count = max(1, int(self._each))
        first = place * count if self._each >= 1 else place // fitting(1, self._each)
        return {"CUDA_VISIBLE_DEVICES": ",".join(self._devices[first : first + count])}

    def wait(self, workers: Sequence[Process], seconds: float) -> Sequence[Process]:
        by_pipe: dict[Connection, Process] = {worker.pipe: worker for worker in workers}
        ready: list[Any] = wait([*by_pipe, self._woken], seconds)
        if self._woken in ready:
            self._woken.recv_bytes()
        return [by_pipe[pipe] for pipe in ready if pipe is not self._woken]

    def wake(self) -> None:
        with suppress(OSError):
            self._waking.send_bytes(b"")

    def shortage(self) -> str:
        return ""

    def close(self) -> None:
        self._waking.close()
        self._woken.close()


def fitting(devices: int, each: float) -> int:
    """Return the number of workers that fit on the GPUs of a machine. A worker's share of a GPU is on one GPU."""
    return devices // int(each) if each >= 1 else devices * int(1 / each + 1e-9)


def main(descriptor: int) -> None:
    """Serve as a worker on an inherited pipe, until the run ends: even if it is killed, its end of the pipe closes."""
    os.set_inheritable(descriptor, False)
    pipe = Connection(descriptor)
    inbox: list[bytes] = []
    arrived = threading.Condition()

    def listen() -> None:
        while True:
            try:
                message = pipe.recv_bytes()
            except (EOFError, OSError):
                with suppress(OSError):
                    os.killpg(0, signal.SIGKILL)  # with the processes of its engine
                os._exit(0)
            with arrived:
                inbox.append(message)
                arrived.notify()

    def receive() -> Any:
        with arrived:
            arrived.wait_for(lambda: inbox)
            return pickle.loads(inbox.pop(0))

    def send(message: Message) -> None:
        pipe.send_bytes(pickle.dumps(message))

    threading.Thread(target=listen, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    service = Service(lambda: receive()())
    send(service.hello())
    receive()
    send(service.begin())
    while True:
        send(service.answer(receive()))
