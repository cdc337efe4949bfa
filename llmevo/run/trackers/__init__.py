"""Where a run's events can be sent beside its own log: one logger a file, each with an extra of its name."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from llmevo.config import read_loggers
from llmevo.errors import ConfigError
from llmevo.run.trackers.base import About, Logger, cleaned
from llmevo.run.trackers.mlflow import Mlflow
from llmevo.run.trackers.tensorboard import TensorBoard
from llmevo.run.trackers.wandb import Wandb

__all__ = ["LOGGERS", "About", "Logger", "check_installed", "cleaned", "read_loggers"]


LOGGERS: Mapping[str, type[Logger]] = {"wandb": Wandb, "tensorboard": TensorBoard, "mlflow": Mlflow}


def check_installed(entries: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError for a logger whose package is not there."""
    for entry in entries:
        name = entry["name"]
        if find_spec(LOGGERS[name].package) is None:
            raise ConfigError(
                f"loggers: the package that {name} needs is not installed; `pip install 'llmevo[{name}]'`, or leave the"
                " logger out"
            )
