"""lm-eval's task objects for the lines of `tasks:`."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmevo.errors import LlmevoError, TaskError
from llmevo.evaluation.tasks.files import (
    check_folders,
    check_members,
    check_names,
    nearest_task,
    refuse_benchmarks,
    untrained_name,
)
from llmevo.evaluation.tasks.function import build_function
from llmevo.evaluation.tasks.judged import GradedTask, VotedTask
from llmevo.evaluation.tasks.lm_eval import check_readable, on_training_split, task_manager
from llmevo.evaluation.tasks.task import Task
from llmevo.evaluation.tasks.text import build_text

Builder = Callable[[Task, Path, Callable[[str], Any]], Any]
"""Makes the leaf of a line that describes its own task, from the line, the folder where relative paths start, and a
function from the name of an lm-eval task to a new leaf of it. The leaf's `task_name` is the line's name; its attribute
`fingerprint`, a string, if it has one, is part of the evaluator's digest: of code or settings that decide scores and
are not in its questions."""

BUILDERS: Mapping[str, Builder] = {
    "text": build_text,
    "function": build_function,
    "judge": GradedTask,
    "votes": VotedTask,
}
"""By the key of the line: see `llmevo.evaluation.tasks.task.KINDS`."""


def load(tasks: Sequence[Task], search_path: Sequence[Path], root: Path, benchmarks: bool = True) -> Any:
    """lm-eval's task objects, of its own tasks and of those that are described in a line.

    The built-in index is large (half a minute on a slow disk) and read only if needed. Raises TaskError; without
    `benchmarks` also for tasks that are public benchmarks: see `refuse_benchmarks`.
    """
    check_folders(search_path)
    known = KnownTasks(search_path, benchmarks)
    loaded = known.load([task.name for task in tasks if task.kind is None])
    for task in tasks:
        if task.kind is not None:
            with _naming(task.name):
                loaded["tasks"][task.name] = BUILDERS[task.kind](task, root, known.one)
    return loaded


class KnownTasks:
    """lm-eval's tasks: those of the search path, and the built-in ones once a name is not among them."""

    def __init__(self, search_path: Sequence[Path], benchmarks: bool) -> None:
        self._search_path, self._benchmarks = search_path, benchmarks
        self._manager: Any = None

    def load(self, names: Sequence[str]) -> Any:
        """Tasks, groups and which belongs to which, as `lm_eval.evaluate` takes them."""
        if not names:
            return {"tasks": {}, "groups": {}, "group_map": {}}
        manager = self._manager_of(names)
        index = manager.task_index
        if not self._benchmarks:
            refuse_benchmarks(names, index)
        for name in names:
            check_members(name, index)
        with _naming(*names):
            return manager.load(
                [on_training_split(name, manager) if untrained_name(name, index) else name for name in names]
            )

    def one(self, name: str) -> Any:
        """A new leaf of a single task."""
        loaded = self.load([name])
        if name not in loaded["tasks"]:
            raise TaskError(f"tasks: {name} is a group or a tag; take one of its tasks ({', '.join(loaded['tasks'])})")
        return loaded["tasks"][name]

    def _manager_of(self, names: Sequence[str]) -> Any:
        """lm-eval's manager that knows these, `X_train` as X. Raises TaskError for an unknown name."""
        if self._manager is None and self._search_path:
            self._manager = task_manager(self._search_path, built_in=False)
        if self._manager is None or self._unknown(names):
            for name in self._unknown(names) if self._manager else ():
                check_readable(name, self._search_path)
            check_names(dict.fromkeys(names, "tasks"), self._search_path)
            self._manager = task_manager(self._search_path)
        for name in self._unknown(names):
            raise TaskError(f"tasks: there is no task {name!r}{nearest_task(name, self._manager.all_tasks)}")
        return self._manager

    def _unknown(self, names: Sequence[str]) -> list[str]:
        index = self._manager.task_index
        return [name for name in names if name not in index and untrained_name(name, index) is None]


@contextmanager
def _naming(*names: str) -> Generator[None]:
    """Name the task in errors of its loading: its code is the user's own, and the hub may be out of reach."""
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
