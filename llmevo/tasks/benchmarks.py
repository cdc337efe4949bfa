"""A public benchmark is no place to search: what is searched on can no longer be reported."""

from collections.abc import Sequence

from llmevo.errors import TaskError
from llmevo.tasks.catalogue import (
    Config,
    Index,
    is_built_in,
    is_training,
    leaves,
    public_data,
    scored_split,
    training_split,
)


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
