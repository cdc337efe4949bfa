"""MLflow tracking (https://mlflow.org/docs/latest/ml/tracking)."""

import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from llmevo.config import TRACKERS
from llmevo.run.trackers.base import About, Logger

LONGEST = 500
"""Characters of a parameter's value that every store takes."""


BATCH = 1000
"""Metrics in one request, at most."""


class Mlflow(Logger):
    """One MLflow run for each run, found again by its tag `llmevo.id`."""

    package = "mlflow"
    options = TRACKERS["mlflow"]

    def __init__(self, run: About, tracking_uri: str | None = None, experiment: str = "llmevo") -> None:
        """`tracking_uri`: a server, database or folder; MLFLOW_TRACKING_URI or MLflow's own default without it."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        for name in ("mlflow", "alembic"):  # they tell of every table that a new database gets
            logging.getLogger(name).setLevel(logging.ERROR)
        self._metric: Any = Metric
        self._client: Any = MlflowClient(tracking_uri)
        place = self._client.get_experiment_by_name(experiment)
        number = place.experiment_id if place else self._client.create_experiment(experiment)
        found = self._client.search_runs([number], f"tags.`llmevo.id` = '{run.id}'", max_results=1)
        entry = found[0] if found else self._client.create_run(number, tags={"llmevo.id": run.id}, run_name=run.name)
        self._id: str = entry.info.run_id
        self.events = int(entry.data.metrics.get("events", 0))
        if found:
            self._client.update_run(self._id, status="RUNNING")
        else:
            params = [Param(key, str(value)[:LONGEST]) for key, value in run.config.items()]
            for first in range(0, len(params), 100):
                self._client.log_batch(self._id, params=params[first : first + 100])

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        for first in range(0, len(metrics), BATCH):
            self._client.log_batch(self._id, metrics=metrics[first : first + BATCH])

    def text(self, name: str, text: str, step: int) -> None:
        self._client.log_text(self._id, text, f"{name}/{step:05d}.txt")

    def file(self, name: str, text: str, step: int) -> None:
        self._client.log_text(self._id, text, name)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")
