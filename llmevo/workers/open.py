"""Start the workers of a config."""

import os
import subprocess
from collections.abc import Mapping
from typing import Any

from llmevo.errors import ConfigError, plural
from llmevo.workers.pool import Pool
from llmevo.workers.protocol import Host, Opening, Scoring


def open_workers(
    opening: Opening,
    scoring: Scoring,
    facts: Mapping[str, Any],
    count: int,
    least: int = 1,
    on: str = "processes",
    address: str | None = None,
    gpus: float = 0.0,
) -> Pool:
    """Start `count` workers, or on Ray between `least` and `count`, each with so many GPUs, and return their pool.

    `opening` makes the scorer in each of them, `scoring` is the run's own part in it, and `facts` decide its scores.
    Raises ConfigError where this machine or the cluster cannot hold them.
    """
    return Pool(_host(opening, count, least, on, address, gpus), scoring, facts)


def _host(opening: Opening, count: int, least: int, on: str, address: str | None, gpus: float) -> Host[Any]:
    if on == "ray":
        from llmevo.workers.ray import RayCluster  # an extra

        return RayCluster(opening, least, count, address, gpus)
    from llmevo.workers.processes import Processes, fitting

    devices = visible_gpus() if gpus else []
    if devices and (fits := fitting(len(devices), gpus)) < count:
        raise ConfigError(
            f"engine.workers: {count} workers with {gpus:g} GPUs each do not fit on {plural(len(devices), 'GPU')}; give"
            f" at most {fits}, or a smaller engine.gpus_per_worker"
        )
    return Processes(opening, count, devices, gpus)


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. Initializes no GPU."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU")]
