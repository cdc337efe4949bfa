"""The list of tasks of `llmevo tasks`, from task files alone: nothing is downloaded."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

from llmevo.evaluation.tasks.files import (
    SUFFIX,
    Config,
    check_folders,
    data_files,
    public_data,
    scored_split,
    training_split,
)
from llmevo.evaluation.tasks.lm_eval import quiet, task_manager


@dataclass(frozen=True)
class ListedTask:
    """A task as its file describes it."""

    name: str
    output: str
    """`multiple_choice`, `generate_until`, `loglikelihood` or `loglikelihood_rolling`; empty for a task in Python."""
    metrics: list[str]
    """As `metric:` takes them, `metric,filter`."""
    splits: dict[str, int | None]
    """The rows of each split; None where they are not on this machine."""
    scored: str | None
    """The split whose questions the task asks."""
    data: str | None
    """The data set on the hub; None for files of this machine."""
    train: str | None
    """The name of the task on its training split; None where there is none."""
    train_split: str | None


def list_tasks(search_path: Sequence[Path], built_in: bool) -> Iterator[ListedTask]:
    """The single tasks of some folders, and lm-eval's own, by name. Raises TaskError for a folder that is missing."""
    check_folders(search_path)
    with quiet():
        manager = task_manager(search_path, built_in)
    for name in manager.all_subtasks:
        config: Config = manager.task_index[name].cfg or {}
        in_python = "class" in config
        output = "" if in_python else str(config.get("output_type") or "generate_until")
        files, train_split = data_files(config), training_split(config)
        splits = [str(config[key]) for key in ("training_split", "validation_split", "test_split") if config.get(key)]
        yield ListedTask(
            name=name,
            output=output,
            metrics=_metrics(config, output),
            splits={split: _count_rows(files.get(split, [])) for split in splits},
            scored=scored_split(config),
            data=public_data(config),
            train=None if train_split is None or in_python else f"{name}{SUFFIX}",
            train_split=train_split,
        )


def _metrics(config: Config, output: str) -> list[str]:
    metrics = [entry.get("metric") for entry in config.get("metric_list") or [] if isinstance(entry, dict)]
    names = [str(metric).rpartition(".")[2] for metric in metrics] or DEFAULT_METRIC_REGISTRY.get(output, [])
    filters = [str(each.get("name")) for each in config.get("filter_list") or [] if isinstance(each, dict)] or ["none"]
    return [f"{name},{filter_}" for name in names for filter_ in filters]


def _count_rows(files: Sequence[str]) -> int | None:
    """The rows of some files, before a task's `process_docs` selects from them; None where that is not known."""
    counts = [_rows(Path(file)) for file in files]
    known = [count for count in counts if count is not None]
    return sum(known) if counts and len(known) == len(counts) else None


def _rows(file: Path) -> int | None:
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            return int(pyarrow.parquet.read_metadata(file).num_rows)
        with file.open(encoding="utf-8", newline="") as lines:
            if file.suffix == ".csv":
                return max(0, sum(1 for _ in csv.reader(lines)) - 1)
            if file.suffix == ".json":
                content = json.load(lines)
                return len(content) if isinstance(content, list) else None
            return sum(1 for line in lines if line.strip()) if file.suffix in (".jsonl", ".txt") else None
    except (OSError, ValueError, csv.Error):
        return None
