"""TensorBoard event files (https://www.tensorflow.org/tensorboard)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmevo.config import TRACKERS
from llmevo.run.trackers.base import About, Logger


class TensorBoard(Logger):
    """Event files in the run's folder; `tensorboard --logdir runs` shows all runs."""

    package = "tensorboard"
    options = TRACKERS["tensorboard"]

    def __init__(self, run: About, folder: str = "tensorboard") -> None:
        """`folder`: where, relative to the run's folder."""
        from torch.utils.tensorboard.writer import SummaryWriter

        # A process that goes on writes everything anew: TensorBoard shows nothing that lies behind a purged step.
        place = run.folder.joinpath(Path(folder).expanduser())
        self._writer: Any = SummaryWriter(str(place), purge_step=0, flush_secs=10)
        self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in run.config.items()), 0)
        self.events = 0

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)

    def file(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)

    def close(self, finished: bool) -> None:
        self._writer.close()
