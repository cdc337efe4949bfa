"""Start the workers of a config."""

from collections.abc import Mapping
from typing import Any

from llmevo.errors import ConfigError, plural
from llmevo.workers.devices import visible_gpus
from llmevo.workers.pool import Pool
from llmevo.workers.protocol import Host, ScorerFactory, Scoring


def start_workers(
    scorer_factory: ScorerFactory,
    scoring: Scoring,
    facts: Mapping[str, Any],
    count: int,
    least: int | None = None,
    on: str = "processes",
    address: str | None = None,
    gpus: float | None = None,
) -> Pool:
    """Start `count` workers, or on Ray between `least` and `count`, each with so many GPUs, and return their pool.

    Without `gpus`, workers on Ray have one GPU each where the cluster has any, and processes have none.
    `scorer_factory` makes the scorer in each of them, `scoring` is the run's own part in it, and `facts` decide its
    scores. Raises ConfigError where this machine or the cluster cannot hold them.
    """
    return Pool(_host(scorer_factory, count, least, on, address, gpus), scoring, facts)


def _host(
    scorer_factory: ScorerFactory, count: int, least: int | None, on: str, address: str | None, gpus: float | None
) -> Host[Any]:
    if on == "ray":
        from llmevo.workers.ray import RayCluster  # an extra

        return RayCluster(scorer_factory, least, count, address, gpus)
    from llmevo.workers.processes import Processes, fitting

    devices = visible_gpus() if gpus else []
    if gpus and devices and (fits := fitting(len(devices), gpus)) < count:
        raise ConfigError(
            f"engine.workers: {count} workers with {gpus:g} GPUs each do not fit on {plural(len(devices), 'GPU')}; give"
            f" at most {fits}, or a smaller engine.gpus_per_worker"
        )
    return Processes(scorer_factory, count, devices, gpus or 1.0)
