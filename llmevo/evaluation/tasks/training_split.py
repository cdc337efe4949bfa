"""`X_train`: a task on the questions of its training split."""

from collections.abc import Mapping
from typing import Any

from llmevo.errors import TaskError
from llmevo.evaluation.tasks.catalogue import Config, base, leaves, scored_split, training_split
from llmevo.evaluation.tasks.files import SUFFIX


def original(name: str, index: Mapping[str, Any]) -> str | None:
    """The task X that `X_train` means; None where a task has that name itself, or there is no X."""
    stem = name.removesuffix(SUFFIX)
    return stem if stem != name and name not in index and stem in index else None


def on_training_split(name: str, manager: Any) -> Any:
    """A new lm-eval task object of the name `X_train`.

    Its questions are those of X's training split, or of its validation split where X has no training split and is
    scored on the test split. Solved examples come from a split that neither of the two is scored on, where there is
    one; else from the questions' own split, and lm-eval leaves out the question itself. Raises TaskError where X has
    no such split, or is not a single task.
    """
    stem = name.removesuffix(SUFFIX)
    entry = manager.task_index[stem]
    if entry.kind.name in ("GROUP", "TAG"):
        members = ", ".join(f"{leaf}{SUFFIX}" for leaf, _ in leaves(stem, manager.task_index))
        raise TaskError(
            f"tasks: {stem} is a {entry.kind.name.lower()}, and {SUFFIX} is for single tasks; list {members}"
        )
    changes = _changes(name, stem, entry.cfg or {})
    return manager._factory.build(entry, overrides=changes, registry=manager.task_index)


def _changes(name: str, stem: str, config: Config) -> dict[str, Any]:
    split = training_split(config)
    if split is None:
        raise TaskError(
            f"tasks: {name}: {stem} has no split beside {scored_split(config)!r}, which it is scored on;"
            " `llmevo tasks --trainable` lists those that have one"
        )
    changes: dict[str, Any] = {"task": name, "test_split": split}
    examples: Mapping[str, Any] = config.get("fewshot_config") or {}
    if "samples" in examples and not examples.get("split"):
        return changes  # written out in the task file
    taken = {base(split), base(scored_split(config))}
    given = examples.get("split") or config.get("fewshot_split"), config.get("validation_split")
    other = next((option for option in given if option is not None and base(option) not in taken), split)
    changes["fewshot_split"] = other
    if examples.get("split"):
        changes["fewshot_config"] = {**examples, "split": other}
    return changes
