"""Pools of scripted workers, on every kind of host, and what is looked at in them."""

import os
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmevo.workers.pool import Limits, Pool
from llmevo.workers.processes import Processes
from llmevo.workers.protocol import Host, Notice, Request, Result, Workers
from support.scripted import FACTS, Script, ScriptedScoring, recipe_of

PATIENCE = 120.0
"""Seconds in which something has to happen."""


def processes(script: Script, count: int) -> Host[Any]:
    return Processes(script.scorer_factory(), count, threads=1)


def ray(script: Script, count: int) -> Host[Any]:
    from llmevo.workers.ray import RayCluster
    from support.ray_cluster import shared_address

    return RayCluster(script.scorer_factory(), 1, count, shared_address())


HOSTS: dict[str, Callable[[Script, int], Host[Any]]] = {"processes": processes, "ray": ray}


@dataclass
class Watched:
    """A pool of scripted workers, and what it said."""

    pool: Pool
    script: Script
    notices: list[Notice] = field(default_factory=list[Notice])

    def changes(self, change: str) -> list[Notice]:
        return [notice for notice in self.notices if notice.change == change]

    def score(self, requests: Sequence[Request]) -> dict[int | str, Result]:
        return score(self.pool, requests)


@contextmanager
def pool_on(
    host: str, script: Script, count: int = 2, limits: Limits | None = None, scoring: ScriptedScoring | None = None
) -> Generator[Watched]:
    """Workers that do what a script says; none of their processes may be left in the end."""
    watched = Watched(Pool(HOSTS[host](script, count), scoring or ScriptedScoring(), FACTS, limits), script)
    watched.pool.observe = watched.notices.append
    try:
        yield watched
    finally:
        watched.pool.close()
        assert_gone(script.processes())


def score(workers: Workers, requests: Sequence[Request]) -> dict[int | str, Result]:
    """The result of each request, which comes exactly once."""
    for request in requests:
        workers.submit(request)
    results = [workers.result() for _ in requests]
    assert sorted(str(result.id) for result in results) == sorted(str(request.id) for request in requests)
    return {result.id: result for result in results}


def requests_for(count: int, rivals: Sequence[Any] = ()) -> list[Request]:
    """Candidates 1, 2, …"""
    return [Request(number, recipe_of(number), rivals=rivals) for number in range(1, count + 1)]


def until(happens: Callable[[], Any], what: str = "") -> Any:
    """Wait for something that is true in the end."""
    end = time.monotonic() + PATIENCE
    while not (found := happens()):
        assert time.monotonic() < end, what or "it does not happen"
        time.sleep(0.01)
    return found


def assert_gone(processes: Iterable[int]) -> None:
    """Wait for processes to end."""
    for process in processes:
        until(lambda number=process: not is_alive(number), f"process {process} is left")


def is_alive(process: int) -> bool:
    """Whether it runs; a process that has ended and is not waited for does not."""
    status = Path("/proc") / str(process) / "stat"
    if Path("/proc/self").exists():
        try:
            return status.read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
