"""A Python function as a task's metric: a line with `function: FILE.py:NAME`."""

import hashlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from llmevo.errors import CandidateError, TaskError, machine_error
from llmevo.evaluation.tasks.lm_eval import end_of, question_text, set_metric
from llmevo.evaluation.tasks.task import Task

Metric = Callable[[dict[str, Any], str], float]
"""Takes the question's document, as the task's data has it, and the model's reply; returns a number. The task's weight
tells whether higher or lower is better."""


def build_function(task: Task, root: Path, own: Callable[[str], Any]) -> Any:
    """The leaf of a line with `function:`: the questions of an lm-eval task whose model writes its reply
    (`generate_until`), each scored by the function. The metric, `NAME,none`, is the mean.

    The reply is the text as the model wrote it: the task's own filters are left out. The file's content is part of the
    evaluator's digest, its imports are not. Raises TaskError.
    """
    place, _, name = str(task.function).rpartition(":")
    file = root / place
    try:
        source = file.read_bytes()
    except FileNotFoundError:
        raise TaskError(
            f"tasks: {task.name}: there is no file {file}; `function: FILE.py:NAME` starts at the config's folder"
        ) from None
    except OSError as error:
        raise TaskError(f"tasks: {task.name}: {file} cannot be read ({error})") from error
    function = _function(task, file, name, source)
    leaf = own(task.questions or task.name)
    if leaf.OUTPUT_TYPE != "generate_until":
        raise TaskError(
            f"tasks: {task.name}: `function:` scores what a model writes, and {task.questions or task.name} is a"
            f" {leaf.OUTPUT_TYPE} task; take a generate_until task (`llmevo tasks` shows the kinds)"
        )
    set_metric(leaf, task.name, name, lambda document, reply: _score(task, function, leaf, document, reply))
    leaf.fingerprint = hashlib.sha256(source).hexdigest()
    return leaf


def _score(task: Task, function: Metric, leaf: Any, document: Mapping[str, Any], reply: str) -> float:
    """The function's number for one reply. Raises CandidateError, with the question and the reason, when it is not
    finite, MachineError when the function lost a network or a disk.
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
        f" {end_of(question_text(leaf, document))}"
    )


def _function(task: Task, file: Path, name: str, source: bytes) -> Metric:
    """Load the function from its file, which is run once for each version of the file."""
    called = f"llmevo_metric_{hashlib.sha256(str(file.absolute()).encode() + source).hexdigest()[:16]}"
    module = sys.modules.get(called)
    if module is None:
        module = ModuleType(called)
        module.__file__ = str(file)
        sys.modules[called] = module  # its classes look their module up there
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
    try:
        inspect.signature(function).bind({}, "")
    except TypeError as error:
        raise TaskError(
            f"tasks: {task.name}: the function {task.function} takes other arguments than the question, a dict, and the"
            f" reply, a str ({error}); write `def {name}(question, reply)`"
        ) from None
    except ValueError:
        pass  # functions that are not written in Python have no signature
    return function
