"""Where a run's events can be sent beside its own log: one logger a file, each with an extra of its name."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from llmevo.errors import ConfigError, nearest
from llmevo.loggers.base import About, Logger, cleaned
from llmevo.loggers.mlflow import Mlflow
from llmevo.loggers.tensorboard import TensorBoard
from llmevo.loggers.wandb import Wandb

__all__ = ["LOGGERS", "About", "Logger", "check_installed", "cleaned", "read_loggers"]

LOGGERS: Mapping[str, type[Logger]] = {"wandb": Wandb, "tensorboard": TensorBoard, "mlflow": Mlflow}


def read_loggers(entries: Any) -> list[dict[str, Any]]:
    """The loggers in a config: names, or mappings of a `name` and options. Raises ValueError for what is unknown."""
    read: list[dict[str, Any]] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        given: dict[str, Any] = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(given, dict) or "name" not in given:
            raise ValueError(
                f"give a list of names, or of mappings with a name and options; known: {', '.join(LOGGERS)}"
            )
        name, logger = given["name"], LOGGERS.get(given["name"])
        if logger is None:
            raise ValueError(f"logger {name!r} is unknown{nearest(str(name), LOGGERS)}")
        for option in given.keys() - {"name"}:
            if option not in logger.options:
                raise ValueError(f"{name} has no option {option!r}{nearest(option, logger.options)}")
        if name in (other["name"] for other in read):
            raise ValueError(f"logger {name!r} is listed twice")
        read.append(given)
    return read


def check_installed(entries: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError for a logger whose package is not there."""
    for entry in entries:
        name = entry["name"]
        if find_spec(LOGGERS[name].package) is None:
            raise ConfigError(
                f"loggers: the package that {name} needs is not installed; `pip install 'llmevo[{name}]'`, or leave the"
                " logger out"
            )
