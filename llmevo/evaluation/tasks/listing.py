"""Which tasks there are, from lm-eval's task files alone: nothing is downloaded."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

from llmevo.errors import TaskError
from llmevo.evaluation.tasks.catalogue import Config, data_files, public_data, scored_split, training_split
from llmevo.evaluation.tasks.manager import task_manager
from llmevo.evaluation.tasks.quiet import quiet

SPLITS = ("training_split", "validation_split", "test_split")


@dataclass(frozen=True)
class Listed:
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
    """What to write for the task on its training split; None where there is none."""
    train_split: str | None


def listed(search_path: Sequence[Path], built_in: bool) -> Iterator[Listed]:
    """The single tasks of some folders, and lm-eval's own, by name. Raises TaskError for a folder that is not there."""
    for folder in search_path:
        if not folder.is_dir():
            raise TaskError(f"task_search_path: there is no folder {folder}")
    with quiet():
        manager = task_manager(search_path, built_in)
    for name in manager.all_subtasks:
        yield describe(name, manager.task_index[name].cfg or {})


def describe(name: str, config: Config) -> Listed:
    """What a task file says of its task."""
    output = "" if "class" in config else str(config.get("output_type") or "generate_until")
    files = data_files(config)
    split = training_split(config)
    found = {str(config[key]): rows(files.get(str(config[key]), [])) for key in SPLITS if config.get(key) is not None}
    train = None if split is None or "class" in config else f"{name}_train"
    return Listed(
        name, output, _metrics(config, output), found, scored_split(config), public_data(config), train, split
    )


def _metrics(config: Config, output: str) -> list[str]:
    metrics = [entry.get("metric") for entry in config.get("metric_list") or [] if isinstance(entry, dict)]
    names = [str(metric).rpartition(".")[2] for metric in metrics] or DEFAULT_METRIC_REGISTRY.get(output, [])
    filters = [str(each.get("name")) for each in config.get("filter_list") or [] if isinstance(each, dict)] or ["none"]
    return [f"{name},{filter_}" for name in names for filter_ in filters]


def rows(files: Sequence[str]) -> int | None:
    """How many rows some files have, before a task's `process_docs` chooses of them; None where that is not known."""
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
    except (OSError, ValueError):
        return None
