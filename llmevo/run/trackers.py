"""Sends a run's events to experiment trackers while it goes on. The run goes on when a tracker fails."""

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, Protocol

from llmevo.errors import ConfigError
from llmevo.merging.recipe import Recipe
from llmevo.run.log import events
from llmevo.run.log.journal import Observer
from llmevo.run.log.state import RunState

QUEUE_SIZE = 1000
"""Events in the queue of a logger, at most."""

PATIENCE = 30.0
"""Seconds that a run waits for a logger, in all: for room in a full queue, and at the end."""

SHOWN = ("genome", "tasks", "heldout", "limit", "search")
"""Sections of a config that are sent; others may name files, servers and keys."""

PRIVATE = ("base_url", "api_key_file", "api_key_env")
"""Keys in these sections that are not sent."""

LONGEST_PARAMETER = 500
"""Characters of a parameter's value that every store of MLflow takes."""

LONGEST_NAME = 80
"""Characters of a folder's name in the id of a run: names in Weights & Biases have 128 at most."""

BATCH, PARAMETER_BATCH = 1000, 100
"""Metrics and parameters in one request to MLflow, at most."""


@dataclass(frozen=True)
class About:
    """The run that a logger is opened for."""

    id: str
    """From the time of the run's start and its folder's name, so equal in every process that resumes the run."""
    name: str
    folder: Path
    config: Mapping[str, Any]
    """The settings of the search as plain values, without secrets."""


class Tracker(Protocol):
    """A tracker. It lives in a thread of its own; an error turns it off and does not reach the run."""

    events: int
    """The number of the run's events that it got from an earlier process, which are not sent again."""

    def __init__(self, run: About, **options: Any) -> None: ...

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers by name, with slashes between the name's parts; `step` counts evaluations."""
        ...

    def text(self, name: str, text: str, step: int) -> None: ...

    def file(self, name: str, text: str, step: int) -> None:
        """Send a text file that replaces the earlier one of its name."""
        ...

    def close(self, finished: bool) -> None:
        """Send the rest. `finished`: the run is complete, and not only stopped."""
        ...


class Wandb(Tracker):
    """Weights & Biases (https://docs.wandb.ai): one wandb run for each run, with files in the run's folder.

    Needs `wandb login` or WANDB_API_KEY.
    """

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
        if online and not wandb.login(prompt=False):  # wandb.init would ask on the terminal, and wait
            raise RuntimeError("not logged in; use `wandb login`, or the option `mode: offline`")
        settings = wandb.Settings(
            silent=True,
            console="off",
            # The command line may have a key, given by --api-key.
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


class TensorBoard(Tracker):
    """TensorBoard event files (https://www.tensorflow.org/tensorboard) in the run's folder."""

    def __init__(self, run: About, folder: str = "tensorboard") -> None:
        """`folder`: relative to the run's folder."""
        from torch.utils.tensorboard.writer import SummaryWriter

        # A resumed run is written anew: TensorBoard shows nothing of earlier processes from a purged step on.
        place = str(run.folder / Path(folder).expanduser())
        self._writer: Any = SummaryWriter(place, purge_step=0, flush_secs=10)
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


class Mlflow(Tracker):
    """MLflow tracking (https://mlflow.org/docs/latest/ml/tracking): one MLflow run for each run, with the tag
    `llmevo.id`.
    """

    def __init__(self, run: About, tracking_uri: str | None = None, experiment: str = "llmevo") -> None:
        """`tracking_uri`: a server, database or folder; MLFLOW_TRACKING_URI or MLflow's own default without it."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        for name in ("mlflow", "alembic"):  # they log every table of a new database
            logging.getLogger(name).setLevel(logging.ERROR)
        self._metric: Any = Metric
        self._client: Any = MlflowClient(tracking_uri)
        known = self._client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else self._client.create_experiment(experiment)
        found = self._client.search_runs([number], f"tags.`llmevo.id` = '{run.id}'", max_results=1)
        entry = found[0] if found else self._client.create_run(number, tags={"llmevo.id": run.id}, run_name=run.name)
        self._id: str = entry.info.run_id
        self._texts: dict[str, int] = {}
        self.events = int(entry.data.metrics.get("events", 0))
        if found:
            self._client.update_run(self._id, status="RUNNING")
        else:
            parameters = [Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in run.config.items()]
            for first in range(0, len(parameters), PARAMETER_BATCH):
                self._client.log_batch(self._id, params=parameters[first : first + PARAMETER_BATCH])

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        for first in range(0, len(metrics), BATCH):
            self._client.log_batch(self._id, metrics=metrics[first : first + BATCH])

    def text(self, name: str, text: str, step: int) -> None:
        place = f"{name}/{step:05d}"
        self._texts[place] = count = self._texts.get(place, 0) + 1  # a prompt and its repair have one step
        self._client.log_text(self._id, text, f"{place}{f'-{count}' if count > 1 else ''}.txt")

    def file(self, name: str, text: str, step: int) -> None:
        self._client.log_text(self._id, text, name)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


LOGGERS: Mapping[str, type[Tracker]] = {"wandb": Wandb, "tensorboard": TensorBoard, "mlflow": Mlflow}
"""By the name of the package and of the extra that each needs; a logger imports its package when it is made."""


def check_installed(entries: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError for a logger whose package is not installed."""
    for entry in entries:
        name = entry["name"]
        if find_spec(name) is None:
            raise ConfigError(
                f"loggers: the package that {name} needs is not installed; run `pip install '.[{name}]'` in the clone"
                " of llmevo, or leave the logger out"
            )


@contextmanager
def forwarded(
    loggers: Sequence[Mapping[str, Any]], folder: Path, warn: Callable[[str], None], patience: float = PATIENCE
) -> Generator[list[Observer]]:
    """Observers for a journal that send its events to these loggers.

    A logger that fails, or costs the run more than `patience` seconds in all, is turned off with one `warn`.
    """
    with ExitStack() as stack:
        threads = [TrackerThread(options, folder, warn, patience) for options in loggers]
        for thread in threads:
            stack.callback(thread.close)
        yield [thread.observe for thread in threads]


class TrackerThread:
    """Sends the events of a run to one logger, which lives in a thread of its own."""

    def __init__(self, options: Mapping[str, Any], folder: Path, warn: Callable[[str], None], patience: float) -> None:
        self.name, self.folder, self._warn = options["name"], folder, warn
        self._options = {key: value for key, value in options.items() if key != "name"}
        self._queue: Queue[tuple[int, Callable[[Tracker], None]] | None] = Queue(QUEUE_SIZE)
        self._thread: threading.Thread | None = None
        self._patience, self._off, self._finished = patience, False, False
        self._count = 0
        self._best: tuple[int, str] | None = None

    def observe(self, event: events.Event, state: RunState) -> None:
        """Send one event."""
        if self._off:
            return
        self._count += 1
        if isinstance(event, events.RunStarted):
            about = about_run(event, self.folder)
            self._thread = threading.Thread(target=self._work, args=(about,), name=self.name, daemon=True)
            self._thread.start()
        self._finished = isinstance(event, events.RunFinished)
        self._put((self._count, self._message(event, state)))

    def _message(self, event: events.Event, state: RunState) -> Callable[[Tracker], None]:
        """A function that sends an event to the logger."""
        step, files, (values, texts) = len(state.trials), dict[str, str](), _contents(event, state)
        searched = isinstance(event, events.Evaluated)
        finals = isinstance(event, events.Selected | events.Served | events.RunFinished)
        if best := state.leader if searched else state.best if finals else None:
            candidate = best.candidate
            if searched:
                values = {**values, "best": best.value}
            if (candidate.id, best.reason) != self._best:  # the last start row may change the reason
                self._best = candidate.id, best.reason
                text = f"#{candidate.id} from {candidate.origin}: {best.value:.4f} {candidate.note} {best.reason}"
                texts["best"] = " ".join(text.split())
                files["best.yml"] = Recipe.model_validate(state.recipes[candidate.id]).to_yaml()
        values = {_clean(name): float(value) for name, value in values.items()} | {"events": self._count}

        def send(logger: Tracker) -> None:
            for name, text in texts.items():
                logger.text(name, text, step)
            for name, text in files.items():
                logger.file(name, text, step)
            logger.numbers(values, step)

        return send

    def _put(self, message: tuple[int, Callable[[Tracker], None]] | None) -> None:
        started = time.monotonic()
        try:
            self._queue.put(message, timeout=max(0.0, self._patience))
        except Full:
            self._fail("it does not keep up")
        self._patience -= time.monotonic() - started

    def _work(self, about: About) -> None:
        """The thread: everything that touches the logger."""
        try:
            logger = LOGGERS[self.name](about, **self._options)
            while (message := self._queue.get()) is not None:
                if self._off:
                    return
                number, send = message
                if number > logger.events:
                    send(logger)
            logger.close(self._finished)
        except BaseException as error:  # also SystemExit: a logger must not end the run
            self._fail(f"{type(error).__name__}: {error}".splitlines()[0])

    def _fail(self, reason: str) -> None:
        if self._off:
            return
        self._off = True
        with suppress(Empty):  # make room, for the run may wait for it
            while True:
                self._queue.get_nowait()
        self._warn(f"The logger {self.name} is off, the run goes on without it: {reason}")

    def close(self) -> None:
        """Wait until everything is sent, or it is said why not, or the patience is over."""
        if self._thread is None:
            return
        if not self._off:
            self._put(None)
        self._thread.join(max(0.0, self._patience))
        if self._thread.is_alive():
            self._fail("it has not sent everything in time")


def about_run(started: events.RunStarted, folder: Path) -> About:
    """Return the description of a run for its loggers."""
    config = {key: _public(started.config[key]) for key in SHOWN if key in started.config}
    flat = dict(_flat(config)) | {"seed": started.seed, "questions": started.items, "genes": len(started.genes)}
    flat |= {f"versions.{name}": number for name, number in started.versions.items()}
    if started.proposer:
        flat["proposer"] = started.proposer
    name = folder.absolute().name
    number = re.sub(r"\D", "", started.time)[:17]
    short = name
    if len(name) > LONGEST_NAME:
        short = f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return About(re.sub(r"[^\w-]", "-", f"{short}-{number}"), name, folder, flat)


def _clean(name: str) -> str:
    """A name that all loggers take: `tasks/arc/exact_match,strict` has a comma, which MLflow refuses."""
    return re.sub(r"[^\w\-. /]", "_", name.removesuffix(",none").replace(",", "."))


def _public(value: Any) -> Any:
    """A part of the config without the servers and key files of judges."""
    if isinstance(value, Mapping):
        return {key: _public(of) for key, of in value.items() if key not in PRIVATE}
    return [_public(of) for of in value] if isinstance(value, list) else value


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, inner if isinstance(inner, str | int | float | bool) else str(inner)


def _contents(event: events.Event, state: RunState) -> tuple[Mapping[str, float], dict[str, str]]:
    """The numbers and the texts of an event."""
    values: Mapping[str, float] = {}
    texts: dict[str, str] = {}
    match event:
        case events.Evaluated():
            genes = {f"genes/{name}": value for name, value in state.candidates[event.candidate].genes.items()}
            seconds = {f"seconds/{name}": value for name, value in event.seconds.items()}
            values = {"score": event.score, "stderr": event.stderr, **_metrics("tasks", event), **genes, **seconds}
        case events.Failed():
            values = {"failures": sum(trial.score is None for trial in state.trials.values())}
            texts = {"failure": f"#{event.candidate}: {event.reason}"}
        case events.Told():
            told = {"generation": event.generation, "step_size": event.sigma, "trust": event.trust}
            values = {name: value for name, value in told.items() if value is not None}
        case events.Prompted():
            tokens = {f"llm/{name}_tokens": count for name, count in event.tokens.items()}
            values = {"llm/proposals": event.used, "llm/seconds": event.seconds, "llm/cost": event.cost, **tokens}
            if thought := "\n".join([event.analysis, *event.problems]).strip():
                texts = {"llm/thought": thought}
        case events.Unscored():
            texts = {"failure": f"{event.name}: {event.reason}"}
        case events.HeldOut():
            row = f"heldout/{event.row}"
            values = {f"{row}/score": event.score, f"{row}/stderr": event.stderr, **_metrics(row, event)}
        case _:
            pass
    return values, texts


def _metrics(prefix: str, event: events.Scored) -> Mapping[str, float]:
    """The metrics of every task, without their standard errors."""
    return {
        f"{prefix}/{task}/{metric.removesuffix(',none')}": value
        for task, metrics in event.tasks.items()
        for metric, value in metrics.items()
        if "_stderr" not in metric and metric != "sample_len"
    }
