"""lm-eval's task objects for the lines of `tasks:`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from llmevo.errors import LlmevoError, TaskError, nearest
from llmevo.tasks.task import Task


def load(names: Sequence[str], search_path: Sequence[Path]) -> Any:
    """lm-eval's task objects. The built-in index is large (half a minute on a slow disk) and read only if needed."""
    for folder in search_path:
        if not folder.is_dir():
            raise TaskError(f"task_search_path: there is no folder {folder}")
    manager: Any = TaskManager(include_path=[*search_path], include_defaults=False) if search_path else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=[*search_path] or None)
    for name in names:
        if name not in manager.all_tasks:
            raise TaskError(f"tasks: there is no task {name!r}{nearest_task(name, manager.all_tasks)}")
    try:
        return manager.load(names)
    except LlmevoError:
        raise
    except IndexError as error:  # lm-eval looks at the first question of each
        raise TaskError(f"tasks: of {', '.join(names)}, one has no questions; check its split and its data") from error
    except Exception as error:  # a task's loader is anybody's code, and the hub may be out of reach
        reason = str(error).strip().splitlines()
        raise TaskError(
            f"tasks: {', '.join(names)} cannot be loaded ({type(error).__name__}: {reason[0] if reason else ''})"
        ) from error


def nearest_task(name: str, known: Sequence[str]) -> str:
    """The hint for a misspelt task; lm-eval has too many to list."""
    hint = nearest(name, known)
    return hint if hint.startswith(", did") else "; `lm_eval ls tasks` lists them, task_search_path adds your own"


def members(task: Task, loaded: Any) -> list[str]:
    """The tasks of a group, or the task itself."""
    if task.name in loaded["tasks"]:
        return [task.name]
    return [leaf.task_name for leaf in loaded["groups"][task.name].get_all_tasks()]


def check_metric(task: Task, loaded: Any) -> None:
    """Raise TaskError unless the task reports the metric."""
    leaves: dict[str, Any] = loaded["tasks"]
    group: Any = loaded.get("groups", {}).get(task.name)
    if task.name not in leaves and (group is None or not group.has_aggregation):
        kind = "tag" if group is None else "group that aggregates nothing"
        raise TaskError(
            f"tasks: {task.name} is a {kind} and has no score of its own; list its tasks instead"
            f" ({', '.join(sorted(leaves))})"
        )
    members: list[Any] = [leaves[task.name]] if task.name in leaves else group.get_all_tasks()
    reported = {
        (metric, filter_.name) for leaf in members for metric in leaf.aggregation() for filter_ in leaf._filters
    }
    if group is not None:
        aggregated = {entry.metric: entry.filter_list for entry in group.aggregate_metric_list}
        reported = {(m, f) for m, f in reported if m in aggregated and f in (aggregated[m] or [f])}
    metrics = sorted(f"{metric},{filter_}" for metric, filter_ in reported)
    if task.metric not in metrics:
        raise TaskError(
            f"tasks: {task.name} has no metric {task.metric!r}{nearest(task.metric, metrics)};"
            f" its metrics are {', '.join(repr(metric) for metric in metrics)}"
        )


def build_once(leaf: Any) -> None:
    """Let a task keep the requests it builds: every candidate is asked the same, and solved examples take seconds."""
    build: Any = leaf.build_all_requests
    built: dict[str, Any] = {}

    def build_all_requests(**options: Any) -> None:
        key = repr({**options, "chat_template": None})  # a method of the model's; the tokenizer's name stands for it
        if key not in built:
            build(**options)
            built[key] = leaf._instances
        leaf._instances = built[key]
        for instance in built[key]:
            instance.resps, instance.filtered_resps = [], {}

    leaf.build_all_requests = build_all_requests
