"""lm-eval's task objects for the lines of `tasks:`."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.api.metrics import mean

from llmevo.errors import CandidateError, LlmevoError, TaskError, machine_error, nearest
from llmevo.evaluation.tasks.catalogue import refuse_benchmarks
from llmevo.evaluation.tasks.files import check_names, nearest_task
from llmevo.evaluation.tasks.function import build_function
from llmevo.evaluation.tasks.judge import build_judge
from llmevo.evaluation.tasks.manager import check_files, check_members, task_manager
from llmevo.evaluation.tasks.task import Task
from llmevo.evaluation.tasks.text import build_text
from llmevo.evaluation.tasks.training_split import on_training_split, original
from llmevo.evaluation.tasks.votes import build_votes
from llmevo.evaluation.tasks.wording import end_of, wording

Builder = Callable[[Task, Path, Callable[[str], Any]], Any]
"""Makes the lm-eval task object of a line that describes its own task. It is given the line, the folder where relative
paths start, and a function from the name of an lm-eval task to a new object of it. The object's `task_name` is the
line's name; if it has an attribute `fingerprint`, a string, that belongs to the digest of what is asked: of code or
settings that decide scores and are not in its questions."""


BUILDERS: Mapping[str, Builder] = {
    "text": build_text,
    "function": build_function,
    "judge": build_judge,
    "votes": build_votes,
}
"""By the key of the line: see `llmevo.evaluation.tasks.task.KINDS`."""


def load(tasks: Sequence[Task], search_path: Sequence[Path], root: Path, benchmarks: bool = True) -> Any:
    """lm-eval's task objects, of its own tasks and of those that are described in a line.

    The built-in index is large (half a minute on a slow disk) and read only if needed. Raises TaskError; without
    `benchmarks` also for tasks that are public benchmarks: see `refuse_benchmarks`.
    """
    check_names({}, search_path)
    known = Known(search_path, benchmarks)
    loaded = known.load([task.name for task in tasks if task.kind is None])
    for task in tasks:
        if task.kind is not None:
            with loading(task.name):
                leaf = BUILDERS[task.kind](task, root, known.one)
            loaded["tasks"][task.name] = leaf
    return loaded


class Known:
    """lm-eval's tasks: those of the search path, and the built-in ones once a name is not among them."""

    def __init__(self, search_path: Sequence[Path], benchmarks: bool = True) -> None:
        self._search_path, self._benchmarks = search_path, benchmarks
        self._manager: Any = None

    def manager(self, names: Sequence[str]) -> Any:
        """lm-eval's manager that knows these, `X_train` as X. Raises TaskError for an unknown name."""
        if self._manager is None and self._search_path:
            self._manager = task_manager(self._search_path, built_in=False)
        if self._manager is None or _unknown(names, self._manager):
            for name in _unknown(names, self._manager) if self._manager else ():
                check_files(name, self._search_path)
            check_names(dict.fromkeys(names, "tasks"), self._search_path)
            self._manager = task_manager(self._search_path)
        for name in _unknown(names, self._manager):
            raise TaskError(f"tasks: there is no task {name!r}{nearest_task(name, self._manager.all_tasks)}")
        return self._manager

    def load(self, names: Sequence[str]) -> Any:
        """Tasks, groups and which belongs to which, as `lm_eval.evaluate` takes them."""
        if not names:
            return {"tasks": {}, "groups": {}, "group_map": {}}
        manager = self.manager(names)
        if not self._benchmarks:
            refuse_benchmarks(names, manager.task_index)
        for name in names:
            check_members(name, manager.task_index)
        with loading(*names):
            trained = [original(name, manager.task_index) is not None for name in names]
            pairs = zip(names, trained, strict=True)
            return manager.load([on_training_split(name, manager) if train else name for name, train in pairs])

    def one(self, name: str) -> Any:
        """A new object of a single task."""
        loaded = self.load([name])
        if name not in loaded["tasks"]:
            raise TaskError(f"tasks: {name} is a group or a tag; take one of its tasks ({', '.join(loaded['tasks'])})")
        return loaded["tasks"][name]


def _unknown(names: Sequence[str], manager: Any) -> list[str]:
    index = manager.task_index
    return [name for name in names if name not in index and original(name, index) is None]


@contextmanager
def loading(*names: str) -> Generator[None]:
    """Say of whatever a loader raises which task it was: it is anybody's code, and the hub may be out of reach."""
    try:
        yield
    except LlmevoError:
        raise
    except (IndexError, StopIteration) as error:  # lm-eval looks at the first question of each
        which = f"{'one of ' if len(names) > 1 else ''}{', '.join(names)}"
        raise TaskError(
            f"tasks: {which} has no questions, or the right answer of the first is none of its choices (numbers count"
            " from 0); check its split and its data"
        ) from error
    except Exception as error:
        cause = error.__cause__ or error  # `datasets` says itself only that there was an error
        reason = str(cause).strip().splitlines()
        raise TaskError(
            f"tasks: {', '.join(names)} cannot be loaded ({type(cause).__name__}: {reason[0] if reason else ''})"
        ) from error


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
        hint = nearest(task.metric, metrics)
        raise TaskError(
            f"tasks: {task.name} has no metric {task.metric!r}{hint if hint.startswith(', did') else ''};"
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


def blame(leaf: Any) -> None:
    """Let a task say on which question its own code fails on a reply, or gives a metric that has no mean."""
    process: Any = leaf.process_results
    averaged = {metric for metric, aggregate in leaf.aggregation().items() if aggregate is mean}

    def process_results(document: Any, results: Any) -> Any:
        try:
            values: Any = process(document, results)
            for metric in averaged & {*values}:
                if values[metric] is None or isinstance(values[metric], str | bytes | Mapping | Sequence):
                    raise TypeError(f"its metric {metric!r} is {values[metric]!r}, not a number")
            return values
        except LlmevoError:
            raise
        except Exception as error:
            if lost := machine_error(error, in_task=True):
                raise lost from error
            reason = f"{type(error).__name__}: {error}, for the question {end_of(wording(leaf, document))}"
            raise CandidateError(f"the task {leaf.task_name} failed: {reason}") from error

    leaf.process_results = process_results
