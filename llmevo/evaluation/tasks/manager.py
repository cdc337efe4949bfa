"""lm-eval's task manager, with the files and the splits of a task found as its author means them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_AGGREGATION_REGISTRY
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.task import TaskConfig
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._yaml_loader import load_yaml

from llmevo.errors import TaskError, nearest
from llmevo.evaluation.tasks.catalogue import BUILT_IN, Config, Index, leaves
from llmevo.evaluation.tasks.files import files_of, nearest_task

SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")


def task_manager(search_path: Sequence[Path], built_in: bool = True) -> Any:
    """lm-eval's manager of the tasks of some folders, and of its own with `built_in` (which takes ten seconds).

    Relative files of data, in a task file of the user's, start at that file's folder where they exist, else at the
    current folder, as lm-eval has it. A split that the data do not have is a TaskError that names the splits.
    """
    manager: Any = TaskManager(include_path=[*search_path] or None, include_defaults=built_in)
    manager._factory = _Factory(meta=None)
    for entry in manager.task_index.values():
        if entry.cfg and entry.yaml_path:
            entry.cfg = located(entry.cfg, Path(entry.yaml_path))
    return manager


def check_files(name: str, search_path: Sequence[Path]) -> None:
    """Raise TaskError where a task is in no index because lm-eval passes over its file, which cannot be read."""
    for folder in search_path:
        for file in files_of(name, folder):
            try:
                load_yaml(file, resolve_func=False)
            except Exception as error:
                reason = " ".join(str(error).split())
                raise TaskError(f"tasks: {name}: {file} cannot be read ({type(error).__name__}: {reason})") from error


def check_members(name: str, index: Index) -> None:
    """Raise TaskError for a group that has no task, or lists one that does not exist."""
    found = [*leaves(name, index)] if name in index else [(name, {"class": None})]
    if not found:
        raise TaskError(f"tasks: {name} is a group without tasks")
    for leaf, config in found:
        if leaf not in index and not config.keys() - {"task"}:  # one with keys is described in the group itself
            raise TaskError(
                f"tasks: {name} lists the task {leaf!r}, which does not exist{nearest_task(leaf, [*index])}"
            )


def located(config: Config, file: Path) -> Config:
    """A task file's `dataset_path`, `data_dir` and `data_files` with those that lie beside the file by their place."""
    if BUILT_IN in file.parents:
        return config
    changes: dict[str, Any] = {}
    if isinstance(path := config.get("dataset_path"), str) and path.startswith("."):
        changes["dataset_path"] = _placed(path, file.parent)
    kwargs = config.get("dataset_kwargs")
    if isinstance(kwargs, Mapping):
        placed = {key: _placed(kwargs[key], file.parent) for key in ("data_files", "data_dir") if key in kwargs}
        changes["dataset_kwargs"] = {**kwargs, **placed}
    return {**config, **changes}


def _placed(given: Any, folder: Path) -> Any:
    """A path, a glob, or a list or mapping of such."""
    if isinstance(given, Mapping):
        return {key: _placed(value, folder) for key, value in given.items()}
    if isinstance(given, list):
        return [_placed(value, folder) for value in given]
    if not isinstance(given, str) or not given or "://" in given or Path(given).is_absolute():
        return given
    there = (folder / given).exists() or any(folder.glob(given))
    return str((folder / given).absolute()) if there else given


class _Factory(TaskFactory):
    """Builds tasks from their files."""

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config = super()._load_full_config(entry, overrides)
        return {**located(config, Path(entry.yaml_path))} if entry.yaml_path else config

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        config = self._load_full_config(entry, overrides)
        if "class" in config:
            return super()._build_task(entry, overrides)
        _check(entry.name, config)
        return _Task(config={key: of for key, of in config.items() if key not in ("tag", "group", "task_list")})


def _check(name: str, config: Config) -> None:
    """Raise TaskError for words of a task file that lm-eval overlooks, or stops at without naming them."""
    fields = {*TaskConfig.__dataclass_fields__, "tag", "group", "task_list"}
    for key in config.keys() - fields:
        raise TaskError(f"tasks: {name}: its file has an unknown key {key!r}{nearest(str(key), sorted(fields))}")
    for entry in config.get("metric_list") or []:
        metric, aggregation = entry.get("metric"), entry.get("aggregation")
        if isinstance(aggregation, str) and aggregation not in AGGREGATION_REGISTRY:
            raise TaskError(
                f"tasks: {name}: its file has an unknown aggregation {aggregation!r}"
                f"{nearest(aggregation, AGGREGATION_REGISTRY)}"
            )
        if aggregation is None and isinstance(metric, str) and metric not in METRIC_AGGREGATION_REGISTRY:
            hint = nearest(metric, METRIC_AGGREGATION_REGISTRY)
            raise TaskError(
                f"tasks: {name}: unknown metric {metric!r}{hint}; a metric of your own needs an `aggregation`"
            )


class _Task(ConfigurableTask):
    """A task that says which splits its data have when it is asked on another."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().download(dataset_kwargs, **kwargs)
        found: Any = self.dataset
        if isinstance(found, DatasetDict):
            self.dataset = _Splits(found)
            self.dataset.asked = {getattr(self.config, key): key for key in SPLITS}
            self.dataset.task = self.config.task


class _Splits(DatasetDict):
    """A task's data by split."""

    task: str | None = None
    asked: Mapping[Any, str] = {}
    """{split: the key of the task file that names it}."""

    def __missing__(self, split: str) -> Any:
        key = self.asked.get(split, "fewshot_config")
        raise TaskError(
            f"tasks: {self.task} has no split {split!r}, which its `{key}` names; its data have"
            f" {', '.join(map(repr, self))}"
        )
