"""What lm-eval's task files say of tasks, read without their data."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.config.group import GroupConfig

from llmevo.errors import TaskError

Index = Mapping[str, Any]
"""lm-eval's entries by name: `TaskManager.task_index`."""


Config = Mapping[str, Any]
"""A task file, its `include:` merged in, its functions as their names."""


BUILT_IN = Path(lm_eval.tasks.__file__).parent


LOADERS = {"arrow", "csv", "generator", "hdf5", "json", "pandas", "parquet", "sql", "text", "webdataset", "xml"} | {
    f"{kind}folder" for kind in ("audio", "image", "pdf", "video")
}
"""`dataset_path`s that are the `datasets` library's readers of files, not names on the hub."""


def leaves(name: str, index: Index) -> Iterator[tuple[str, Config]]:
    """The single tasks of a task, group or tag: (name, what its file says)."""
    entry = index[name]
    if entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from leaves(member, index)
    elif entry.kind.name == "GROUP":
        yield from _members(entry.cfg or {}, index)
    else:
        yield name, entry.cfg or {}


def _members(group: Config, index: Index) -> Iterator[tuple[str, Config]]:
    own = {key: value for key, value in group.items() if key not in GroupConfig.__dataclass_fields__}
    listed = group.get("task") or []
    for member in [listed] if isinstance(listed, str) else listed:
        changes: dict[str, Any] = {} if isinstance(member, str) else dict(member)
        name = member if isinstance(member, str) else str(changes.get("group") or changes.get("task"))
        if name in index:
            for leaf, config in leaves(name, index):
                yield leaf, {**config, **own, **{k: v for k, v in changes.items() if k not in ("task", "group")}}
        elif "group" in changes:
            yield from _members({**own, **changes}, index)
        else:
            yield name, {**own, **changes}


def scored_split(config: Config) -> str | None:
    """The split whose questions lm-eval asks: the test split, else the validation split."""
    test = config.get("test_split")
    return test if test is not None else config.get("validation_split")


def training_split(config: Config) -> str | None:
    """The split that `_train` asks: the training split, else the validation split where the test split is scored. None
    where both are missing, or the same that is scored.
    """
    scored = base(scored_split(config))
    for split in (config.get("training_split"), config.get("validation_split")):
        if split is not None and base(split) != scored:
            return str(split)
    return None


def base(split: str | None) -> str | None:
    """A split without its slice: `train` of `train[:10%]`."""
    return split if split is None else split.split("[")[0]


def is_training(split: str | None) -> bool:
    """Whether a split is by its name one to train on, such as `train[:500]` or `auxiliary_train`."""
    return split is not None and all(re.search(r"(?:^|[_.\-])train", part) for part in split.lower().split("+"))


def is_built_in(name: str, index: Index) -> bool:
    """Whether a task's file is one of lm-eval's own."""
    entry = index.get(name)
    return entry is not None and entry.yaml_path is not None and BUILT_IN in Path(entry.yaml_path).parents


def public_data(config: Config) -> str | None:
    """The data set on the hub, or the address, that a task's questions come from; None for files of this machine."""
    path = config.get("dataset_path")
    if not isinstance(path, str):
        return None
    if path in LOADERS:
        return next((file for files in data_files(config).values() for file in files if "://" in file), None)
    if Path(path).exists():
        return None
    name = config.get("dataset_name")
    return f"{path} ({name})" if name else path


def data_files(config: Config) -> dict[str, list[str]]:
    """{split: its files}, of a task that reads files; those without a split are `train`, as `datasets` has it."""
    given = (config.get("dataset_kwargs") or {}).get("data_files") or {}
    splits: Mapping[str, Any] = given if isinstance(given, Mapping) else {"train": given}
    return {str(split): [files] if isinstance(files, str) else [*map(str, files)] for split, files in splits.items()}


def refuse_benchmarks(names: Sequence[str], index: Index) -> None:
    """Raise TaskError when one of these tasks asks what models are publicly compared by.

    That is the scored split of lm-eval's own tasks: test, or validation where a benchmark keeps its test answers secret
    (HellaSwag, BoolQ). Of the user's own task files it is every split of a hub data set that is not one to train on by
    its name. It is judged by the files alone, before any data are loaded. Local data, and `X_train`, are free.
    """
    for name in names:
        if name not in index:
            continue  # `X_train`, which asks another split than the scored one
        for leaf, config in leaves(name, index):
            if what := _public(leaf, config, index):
                group = "" if leaf == name else f" (its task {leaf})"
                raise TaskError(
                    f"tasks: {name}{group} is a public benchmark: it is scored on {what}. A merge searched on that has"
                    f" seen what it is measured by. {_way_out(name, leaf, config)}, or set"
                    " `allow_benchmark_tasks: true` to search on it all the same"
                )


def _public(leaf: str, config: Config, index: Index) -> str | None:
    split, data, own = scored_split(config), public_data(config), is_built_in(leaf, index)
    if data is None and not (own and "dataset_path" not in config):
        return None
    if not own and is_training(split):
        return None
    return f"the split {split!r} of {data or 'a data set that it loads itself'}"


def _way_out(name: str, leaf: str, config: Config) -> str:
    split = training_split(config)
    if split is None:
        return f"It has no other split: search on a task of your own, name {name} under `heldout:`"
    return f"Search on {leaf}_train, its split {split!r}, and name {name} under `heldout:`"
