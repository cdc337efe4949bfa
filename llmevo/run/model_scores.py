"""Scores of given models, such as a fine-tune and its adapter, on the tasks of a config."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from llmevo.config import Config, read_config
from llmevo.engines.hf import HfEngine
from llmevo.errors import ConfigError
from llmevo.evaluation.score import Score
from llmevo.run.scorer import Scorer

Weights = Iterable[tuple[str, Tensor]]


class ModelScorer:
    """The search tasks of a config, loaded, to be asked of several models' weights in one engine.

    Raises ConfigError for a config without tasks, TaskError for a task that cannot be used.
    """

    def __init__(self, tasks: Config | Path | str, root: Path) -> None:
        """Relative paths start at the config file's folder, or at `root` where `tasks` is a `Config`."""
        if not isinstance(tasks, Config):
            tasks, root = read_config(Path(tasks)), Path(tasks).parent
        if not tasks.tasks:
            raise ConfigError("--tasks: the config names no tasks")
        self._device, self._seed = tasks.engine.device, tasks.evaluation_seed
        self._evaluator = Scorer(tasks, root.absolute()).evaluator

    def of(
        self, models: Mapping[str, Weights], folder: Path, dtype: str, names: Collection[str]
    ) -> Iterator[tuple[str, Score]]:
        """Yield each model's name and score. `folder` has the config and tokenizer of all of them; `names` are the
        tensors that each of them has.
        """
        engine = HfEngine(folder, folder, dtype, self._device, seed=self._seed)
        try:
            for model, weights in models.items():
                engine.load(weights, names)
                yield model, self._evaluator.score(engine.lm)
        finally:
            engine.close()
