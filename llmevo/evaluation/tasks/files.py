"""Task files, read without the data of their tasks: names, members, splits and data sets.

lm-eval's index of its own tasks takes ten seconds: it parses fourteen thousand YAML files. `check_names` searches them
as text, which takes under one. This module does not import lm-eval, which takes seconds.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmevo.errors import TaskError, nearest

Index = Mapping[str, Any]
"""lm-eval's entries by name: `TaskManager.task_index`."""

Config = Mapping[str, Any]
"""A task file, its `include:` merged in, its functions as their names."""

SUFFIX = "_train"
"""At the end of a task's name: the task on the questions of its training split."""

BUILT_IN = Path(str(getattr(find_spec("lm_eval"), "origin", None))).parent / "tasks"
"""The folder of lm-eval's own tasks."""

IGNORED = {"__pycache__", ".ipynb_checkpoints"}
"""Folders that lm-eval passes over."""

NAME = re.compile(rb"""(?:^|[{,])[\s-]*["']?(?:task|group|tag)["']?\s*:\s*["']?([^\s"'#\[\]{},]+)""", re.MULTILINE)
"""The name of a task, group or tag in a task file. It misses a few, so it serves for suggestions only."""

LOADERS = {"arrow", "csv", "generator", "hdf5", "json", "pandas", "parquet", "sql", "text", "webdataset", "xml"} | {
    f"{kind}folder" for kind in ("audio", "image", "pdf", "video")
}
"""Values of `dataset_path` that are the `datasets` library's readers of files, not names on the hub."""


# Names


def check_folders(search_path: Sequence[Path]) -> None:
    """Raise TaskError for a folder that does not exist."""
    for folder in search_path:
        if not folder.is_dir():
            raise TaskError(f"task_search_path: there is no folder {folder}")


def check_names(names: Mapping[str, str], search_path: Sequence[Path]) -> None:
    """Find a misspelt task without lm-eval's index.

    `names` are the tasks, each with the key of the config that lists it. Raises TaskError for a name that is in no task
    file of the search path nor of lm-eval, with the nearest name, and for a folder that does not exist. A name that is
    somewhere in a file may still be none of a task: the index decides.
    """
    check_folders(search_path)
    # Names that are not ASCII may be written with escapes: they are left to the index.
    missing = {name: _pattern(name) for name in names if name.isascii()}
    own: dict[str, None] = {}
    known: dict[str, None] = {}
    for folder in (*search_path, BUILT_IN):
        for _, content in _contents(folder):
            for name in [name for name, pattern in missing.items() if pattern.search(content)]:
                del missing[name]
            if not missing:
                return
            found = dict.fromkeys(name.decode(errors="replace") for name in NAME.findall(content))
            (own if folder in search_path else known).update(found)
    for name in missing:
        hint = near(name, own) or nearest_task(name, known)  # some of lm-eval's names are like every name
        raise TaskError(f"{names[name]}: there is no task {name!r}{hint}")


def files_of(name: str, folder: Path) -> list[Path]:
    """The files of a folder that seem to describe a task, group or tag of this name."""
    words = {name.encode(), name.removesuffix(SUFFIX).encode()}
    return [file for file, content in _contents(folder) if words.intersection(NAME.findall(content))]


def near(word: str, known: Iterable[str]) -> str:
    """The hint for a misspelt word, without a list of all words where none is near."""
    hint = nearest(word, known)
    return hint if hint.startswith(", did") else ""


def nearest_task(name: str, known: Iterable[str]) -> str:
    """The hint for a misspelt task; lm-eval has too many to list."""
    return near(name, known) or "; `llmevo tasks` lists them, task_search_path adds your own"


def _pattern(name: str) -> re.Pattern[bytes]:
    """The name, or that of the task whose training split it means, as a word of its own."""
    words = {name, name.removesuffix(SUFFIX)} - {""}
    return re.compile(rb"(?<!\w)(?:" + b"|".join(re.escape(word.encode()) for word in words) + rb")(?!\w)")


def _contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for file in folder.glob("**/*.yaml"):
        if IGNORED.isdisjoint(file.parts):
            try:
                yield file, file.read_bytes()
            except OSError:
                continue


# Members


def leaves(name: str, index: Index) -> Iterator[tuple[str, Config]]:
    """The single tasks of a task, group or tag: (name, task file)."""
    entry = index[name]
    if entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from leaves(member, index)
    elif entry.kind.name == "GROUP":
        yield from _members(entry.cfg or {}, index)
    else:
        yield name, entry.cfg or {}


def _members(group: Config, index: Index) -> Iterator[tuple[str, Config]]:
    from lm_eval.config.group import GroupConfig

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


def check_members(name: str, index: Index) -> None:
    """Raise TaskError for a group that has no task, or lists one that does not exist."""
    found = [*leaves(name, index)] if name in index else [(name, {"class": None})]
    if not found:
        raise TaskError(f"tasks: {name} is a group without tasks")
    for leaf, config in found:
        if leaf not in index and not config.keys() - {"task"}:  # one with keys is described in the group itself
            raise TaskError(f"tasks: {name} lists the task {leaf!r}, which does not exist{nearest_task(leaf, index)}")


# Splits


def scored_split(config: Config) -> str | None:
    """The split that lm-eval scores: the test split, else the validation split."""
    test = config.get("test_split")
    return test if test is not None else config.get("validation_split")


def training_split(config: Config) -> str | None:
    """The split of `X_train`: the training split, else the validation split where the test split is scored. None where
    both are missing, or equal the scored one.
    """
    scored = _unsliced(scored_split(config))
    for split in (config.get("training_split"), config.get("validation_split")):
        if split is not None and _unsliced(split) != scored:
            return str(split)
    return None


def _unsliced(split: str | None) -> str | None:
    """`train` of `train[:10%]`."""
    return split if split is None else split.split("[")[0]


def is_training(split: str | None) -> bool:
    """Return whether a split's name is that of a training split, such as `train[:500]` or `auxiliary_train`."""
    return split is not None and all(re.search(r"(?:^|[_.\-])train", part) for part in split.lower().split("+"))


def untrained_name(name: str, index: Index) -> str | None:
    """The task X that `X_train` means; None where a task has that name itself, or there is no X."""
    original = name.removesuffix(SUFFIX)
    return original if original != name and name not in index and original in index else None


def training_changes(name: str, original: str, config: Config) -> dict[str, Any]:
    """The keys of a task file that make `X_train`, called `name`, of X.

    Its questions are those of `training_split`. Solved examples come from a split that neither of the two is scored on,
    where there is one; else from the questions' own split, and lm-eval leaves out the question itself. Raises TaskError
    where X has no such split.
    """
    split = training_split(config)
    if split is None:
        raise TaskError(
            f"tasks: {name}: {original} has no split beside {scored_split(config)!r}, which it is scored on;"
            " `llmevo tasks --trainable` lists those that have one"
        )
    changes: dict[str, Any] = {"task": name, "test_split": split}
    examples: Mapping[str, Any] = config.get("fewshot_config") or {}
    if "samples" in examples and not examples.get("split"):
        return changes  # written out in the task file
    taken = {_unsliced(split), _unsliced(scored_split(config))}
    given = examples.get("split") or config.get("fewshot_split"), config.get("validation_split")
    other = next((option for option in given if option is not None and _unsliced(option) not in taken), split)
    changes["fewshot_split"] = other
    if examples.get("split"):
        changes["fewshot_config"] = {**examples, "split": other}
    return changes


# Data


def locate_data(config: Config, file: Path) -> Config:
    """Make the `dataset_path`, `data_dir` and `data_files` absolute that exist in the folder of a user's task file."""
    if BUILT_IN in file.parents:
        return config
    changes: dict[str, Any] = {}
    if isinstance(path := config.get("dataset_path"), str) and path.startswith("."):
        changes["dataset_path"] = _absolute(path, file.parent)
    kwargs = config.get("dataset_kwargs")
    if isinstance(kwargs, Mapping):
        placed = {key: _absolute(kwargs[key], file.parent) for key in ("data_files", "data_dir") if key in kwargs}
        changes["dataset_kwargs"] = {**kwargs, **placed}
    return {**config, **changes}


def _absolute(given: Any, folder: Path) -> Any:
    """Of a path, a glob, or a list or mapping of these."""
    if isinstance(given, Mapping):
        return {key: _absolute(value, folder) for key, value in given.items()}
    if isinstance(given, list):
        return [_absolute(value, folder) for value in given]
    if not isinstance(given, str) or not given or "://" in given or Path(given).is_absolute():
        return given
    there = (folder / given).exists() or any(folder.glob(given))
    return str((folder / given).absolute()) if there else given


def data_files(config: Config) -> dict[str, list[str]]:
    """{split: its files}, of a task that reads files; those without a split are `train`, as in `datasets`."""
    given = (config.get("dataset_kwargs") or {}).get("data_files") or {}
    splits: Mapping[str, Any] = given if isinstance(given, Mapping) else {"train": given}
    return {str(split): [files] if isinstance(files, str) else [*map(str, files)] for split, files in splits.items()}


def public_data(config: Config) -> str | None:
    """The data set on the hub, or the address, of a task's questions; None for files of this machine."""
    path = config.get("dataset_path")
    if not isinstance(path, str):
        return None
    if path in LOADERS:
        return next((file for files in data_files(config).values() for file in files if "://" in file), None)
    if Path(path).exists():
        return None
    name = config.get("dataset_name")
    return f"{path} ({name})" if name else path


# Public benchmarks


def refuse_benchmarks(names: Sequence[str], index: Index) -> None:
    """Raise TaskError when one of these tasks asks questions by which models are publicly compared.

    These are the scored split of lm-eval's own tasks: test, or validation where a benchmark keeps its test answers
    secret (HellaSwag, BoolQ). Of the user's own task files it is every split of a hub data set whose name is not one of
    a training split. Only the files decide, before any data are loaded. Local data, and `X_train`, are allowed.
    """
    for name in names:
        if name not in index:
            continue  # `X_train`, which asks another split than the scored one
        for leaf, config in leaves(name, index):
            if questions := _public_questions(leaf, config, index):
                split = training_split(config)
                instead = (
                    f"It has no other split: search on a task of your own, name {name} under `heldout:`"
                    if split is None
                    else f"Search on {leaf}_train, its split {split!r}, and name {name} under `heldout:`"
                )
                group = "" if leaf == name else f" (its task {leaf})"
                raise TaskError(
                    f"tasks: {name}{group} is a public benchmark: it is scored on {questions}. A merge searched on that"
                    f" has seen the questions that measure it. {instead}, or set `allow_benchmark_tasks: true` to"
                    " search on it all the same"
                )


def _public_questions(leaf: str, config: Config, index: Index) -> str | None:
    entry, split, data = index.get(leaf), scored_split(config), public_data(config)
    own = entry is not None and entry.yaml_path is not None and BUILT_IN in Path(entry.yaml_path).parents
    if data is None and not (own and "dataset_path" not in config):
        return None
    if not own and is_training(split):
        return None
    return f"the split {split!r} of {data or 'a data set that it loads itself'}"
