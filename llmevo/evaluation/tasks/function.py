"""A Python function as a task's metric."""

import hashlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from lm_eval.api.metrics import mean
from lm_eval.filters import build_filter_ensemble

from llmevo.errors import CandidateError, TaskError, machine_error
from llmevo.evaluation.tasks.task import Task
from llmevo.evaluation.tasks.wording import end_of, wording

Metric = Callable[[dict[str, Any], str], float]
"""Takes the question's document, as the task's data has it, and the model's reply; gives a number, higher or lower is
better as the task's weight says."""


def build_function(task: Task, root: Path, own: Callable[[str], Any]) -> Any:
    """The task of a line with `function: FILE.py:NAME`: the questions of an lm-eval task whose model writes its reply
    (`generate_until`), each scored by the function. The metric, `NAME,none`, is the mean.

    The reply is the text as the model wrote it: the task's own filters are left out. What is in the file belongs to the
    digest of what is asked, what it imports does not. Raises TaskError.
    """
    assert task.function is not None
    place, _, name = task.function.rpartition(":")
    file = root / place
    source = _source(task, file)
    function = _function(task, file, name, source)
    leaf = own(task.questions or task.name)
    if leaf.OUTPUT_TYPE != "generate_until":
        raise TaskError(
            f"tasks: {task.name}: `function:` scores what a model writes, and {task.questions or task.name} is a"
            f" {leaf.OUTPUT_TYPE} task; take a generate_until task (`llmevo tasks` shows the kinds)"
        )

    def process_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        return {name: scored(task, function, wording(leaf, document), document, results[0])}

    metric = {"metric": name, "aggregation": "mean", "higher_is_better": True}
    for key, value in {
        "task": task.name,
        "process_results": process_results,
        "metric_list": [metric],
        "filter_list": None,
    }.items():
        leaf.set_config(key=key, value=value)
    leaf._filters = [build_filter_ensemble("none", [("take_first", None)])]
    leaf._metric_fn_list, leaf._metric_fn_kwargs = {name: None}, {name: {}}
    leaf._aggregation_list, leaf._higher_is_better = {name: mean}, {name: True}
    leaf.fingerprint = hashlib.sha256(source).hexdigest()
    return leaf


def scored(task: Task, function: Metric, question: str, document: Mapping[str, Any], reply: str) -> float:
    """What the function says of one reply. Raises CandidateError, with the question and the reason, when that is no
    finite number, MachineError when the function lost a network or a disk.
    """
    value: Any
    try:
        value = function(dict(document), reply)
    except (Exception, SystemExit) as error:
        if lost := machine_error(error, in_task=True):
            raise lost from error
        file = Path(str(task.function).rpartition(":")[0]).name
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).name == file]
        reason = f"raised {type(error).__name__}: {error}" + (f" in line {lines[-1]}" if lines else "")
    else:
        if isinstance(value, Real) and math.isfinite(float(value)):
            return float(value)
        reason = f"gave {value!r}, which is no number" if not isinstance(value, Real) else f"gave {value}"
    raise CandidateError(
        f"{task.name}: the function {task.function} {reason}, for the reply {end_of(reply)} to the question"
        f" {end_of(question)}"
    )


def _source(task: Task, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise TaskError(
            f"tasks: {task.name}: there is no file {file}; `function: FILE.py:NAME` starts at the config's folder"
        ) from None
    except OSError as error:
        raise TaskError(f"tasks: {task.name}: {file} cannot be read ({error})") from error


def _function(task: Task, file: Path, name: str, source: bytes) -> Metric:
    """From the file, which is run once for each of its versions."""
    called = f"llmevo_metric_{hashlib.sha256(str(file.absolute()).encode() + source).hexdigest()[:16]}"
    module = sys.modules.get(called)
    if module is None:
        module = ModuleType(called)
        module.__file__ = str(file)
        sys.modules[called] = module  # where its classes say they come from
        try:
            exec(compile(source, file, "exec"), module.__dict__)
        except (Exception, SystemExit) as error:
            del sys.modules[called]
            raise TaskError(f"tasks: {task.name}: {file} cannot be run ({type(error).__name__}: {error})") from error
    function: Metric | None = getattr(module, name, None)
    if not callable(function):
        known = sorted(key for key, value in vars(module).items() if callable(value) and value.__module__ == called)
        listed = f"; it has {', '.join(known)}" if known else ""
        raise TaskError(f"tasks: {task.name}: there is no function {name!r} in {file}{listed}")
    _check_arguments(task, name, function)
    return function


def _check_arguments(task: Task, name: str, function: Metric) -> None:
    """Raise TaskError for a function that cannot be called with a question and a reply."""
    try:
        inspect.signature(function).bind({}, "")
    except TypeError as error:
        raise TaskError(
            f"tasks: {task.name}: the function {task.function} takes other arguments than the question, a dict, and the"
            f" reply, a str ({error}); write `def {name}(question, reply)`"
        ) from None
    except ValueError:
        pass  # what is not written in Python does not tell
