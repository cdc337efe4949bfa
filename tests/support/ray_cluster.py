"""Clusters of Ray on this machine, for tests."""

import importlib
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

MEMORY = 78643200
"""Bytes of a machine's object store, the least that Ray accepts."""

MARKS = (
    pytest.mark.ray,
    # Ray leaves files and sockets open.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
)
"""The marks of a test that starts a cluster."""

# A worker of Ray has the environment of its node, not the driver's `sys.path`: it has to find `support` as well.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))


def new_cluster(**machine: Any) -> Any:
    """A `ray.cluster_utils.Cluster` of one machine; to be shut down. It believes in any number of cores and GPUs."""
    first = {"object_store_memory": MEMORY, "include_dashboard": False, **machine}
    return importlib.import_module("ray.cluster_utils").Cluster(initialize_head=True, head_node_args=first)


@cache
def shared_address() -> str:
    """The address of a cluster with eight cores for all tests of this process, with which it ends."""
    return new_cluster(num_cpus=8).address
