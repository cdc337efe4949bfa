"""Weights & Biases (https://docs.wandb.ai)."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from llmevo.config import TRACKERS
from llmevo.run.trackers.base import About, Logger


class Wandb(Logger):
    """One wandb run for each run; its files lie in the run's folder. Logged in by `wandb login` or WANDB_API_KEY."""

    package = "wandb"
    options = TRACKERS["wandb"]

    def __init__(
        self,
        run: About,
        project: str = "llmevo",
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: str | None = None,
    ) -> None:
        """`mode`: `online`, or `offline` for a later `wandb sync`; WANDB_MODE by default."""
        import wandb

        self._wandb: Any = wandb
        online = (mode or os.environ.get("WANDB_MODE") or "online") == "online"
        if online and not wandb.login(prompt=False):  # without this it would ask on the terminal, and wait
            raise RuntimeError("not logged in; use `wandb login`, or the option `mode: offline`")
        settings = wandb.Settings(
            silent=True,
            console="off",
            # They would send the command line, and with it a key given by --api-key.
            x_disable_meta=True,
            x_disable_machine_info=True,
            disable_git=True,
            disable_code=True,
        )
        self._run: Any = wandb.init(
            project=project,
            entity=entity,
            group=group,
            tags=[*tags],
            mode="online" if online else "offline",
            id=run.id,
            name=run.name,
            resume="allow",
            dir=str(run.folder),
            config={**run.config},
            settings=settings,
        )
        self._run.define_metric("*", step_metric="evaluations")
        self.events = int(self._run.summary.get("events") or 0)

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "evaluations": step}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        self._run.log({name: text}, step=step)

    def file(self, name: str, text: str, step: int) -> None:
        artifact = self._wandb.Artifact(f"{self._run.id}-{name}", type="result", metadata={"evaluations": step})
        with artifact.new_file(name) as file:
            file.write(text)
        self._run.log_artifact(artifact)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
