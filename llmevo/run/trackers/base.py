"""What a logger is: a place elsewhere that a run's numbers and texts are sent to while it goes on."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol


@dataclass(frozen=True)
class About:
    """The run that a logger is opened for."""

    id: str
    """The same for every process that goes on with the run: from its start's time and its folder's name."""
    name: str
    folder: Path
    config: Mapping[str, Any]
    """What was searched and how; plain values, nothing secret in them."""


class Logger(Protocol):
    """One place. Made, called and closed in a thread of its own; whatever it raises turns it off and nothing else."""

    package: ClassVar[str]
    """What has to be importable; the extra is called like the logger."""
    options: ClassVar[tuple[str, ...]]
    """Keywords of `__init__` that a config may give."""
    events: int
    """How many events of the run it holds from an earlier process; these are not sent to it again."""

    def __init__(self, run: About, **options: Any) -> None: ...

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name, with slashes between their parts; `step` counts evaluations."""
        ...

    def text(self, name: str, text: str, step: int) -> None: ...

    def file(self, name: str, text: str, step: int) -> None:
        """A text file that replaces the earlier one of its name."""
        ...

    def close(self, finished: bool) -> None:
        """Send what is left. `finished`: the run has come to its end, and was not only stopped."""
        ...


def cleaned(name: str) -> str:
    """A name that all of them take: `tasks/arc/exact_match,strict` has a comma, which MLflow refuses."""
    return re.sub(r"[^\w\-. /]", "_", name.removesuffix(",none").replace(",", "."))
