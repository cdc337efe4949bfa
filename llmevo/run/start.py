"""The beginning of a run: what a config is checked for, and the log that a run writes."""

import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from llmevo.config import Config, Elastic, Engine
from llmevo.errors import ConfigError, ProposerRefused, UserError
from llmevo.evaluation.tasks.files import check_names
from llmevo.run.experiment import Experiment
from llmevo.run.log import events
from llmevo.run.log.storage import RunLog, check_free, holds_run, read_log

MOST_SEED = 2**32 - 1
"""cmaes and optuna seed numpy's RandomState, which takes 32 bits."""


def check_start(config: Config, root: Path) -> None:
    """Find mistakes that a config may have and a new run must not, before anything is loaded; a log of an earlier run
    is read with them. Relative folders start at `root`. Raises ConfigError, and TaskError for a misspelt task.
    """
    for key, seed in (("seed", config.search.seed), ("evaluation_seed", config.search.evaluation_seed)):
        if seed is not None and seed > MOST_SEED:
            raise ConfigError(f"search.{key}: {seed} is more than {MOST_SEED}, the largest seed of the optimizers")
    for key, tasks in (("tasks", config.tasks), ("heldout", config.heldout)):
        if tasks and not any(task.weight for task in tasks):
            raise ConfigError(
                f"{key}: every weight is 0, so every candidate would have the score 0; give the tasks that count a"
                " weight, below 0 where lower is better"
            )
    lists = {"heldout": config.heldout, "tasks": config.tasks}
    names = {task.questions or task.name: key for key, tasks in lists.items() for task in tasks if task.asks_lm_eval}
    check_names(names, [root / folder for folder in config.task_search_path])
    if config.engine.on == "ray":
        _check_cluster(config.engine)


def _check_cluster(engine: Engine) -> None:
    """Raise ConfigError unless the workers can be started on Ray."""
    from llmevo.workers.ray import check_cluster

    workers = engine.workers
    if isinstance(workers, Elastic):
        check_cluster(workers.min, workers.max, engine.address, engine.gpus)
    else:
        check_cluster(None, workers if isinstance(workers, int) else 1, engine.address, engine.gpus)


@contextmanager
def new_log(experiment: Experiment, folder: Path | Callable[[], Path], config: str) -> Generator[RunLog]:
    """Open the log of a new run, after every check that needs no scoring; `config` is the text of its config.yml. The
    folder may be a function that chooses it after the checks, so that a run which began meanwhile has another one.

    The scorer's `warn` is told what the models and the LLM may do wrong. A new folder is removed again if the run ends
    before its first event, or by a mistake of the user's before any candidate is scored or fails, unless the run can be
    resumed (ProposerRefused). Raises RunError when the folder holds a run, and what `Experiment.check` raises.
    """
    from llmevo.run.preflight import brief, forecast  # torch takes seconds to import

    choose = folder if callable(folder) else lambda: folder
    check_free(choose())
    experiment.check()
    scorer = experiment.scorer
    for line in [*map(str, forecast.unasked(experiment, forecast.first_prompt(experiment))), *brief(scorer)]:
        scorer.warn(line)
    _ = scorer.checksums  # reads the models, which may take a while
    place = choose()
    existed = place.exists()
    with RunLog(place) as log:
        try:
            log.write("config.yml", config)
            yield log
        except BaseException as error:
            if not (existed or log.missing):
                mistake = isinstance(error, UserError) and not isinstance(error, ProposerRefused)
                if not holds_run(log.place) or (mistake and not _has_result(log)):
                    shutil.rmtree(log.place)
            raise


def _has_result(log: RunLog) -> bool:
    """Return whether a candidate was scored or failed."""
    return any(isinstance(event, events.Evaluated | events.Failed) for event in read_log(log.place))
