"""Scoring: lm-eval's own tasks, metrics and aggregation over the live engine."""

import hashlib
import json
import logging
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lm_eval import evaluator
from lm_eval.api.metrics import mean
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from llmevo.errors import CandidateError, LlmevoError, TaskError, nearest
from llmevo.questions import blocks, chosen
from llmevo.racing import beaten, difference
from llmevo.tasks import Protocol, Task
from llmevo.trial import Score

TEXT = 600
"""Characters that are kept of a question (its end), an answer and a reply (their beginnings)."""

BOOTSTRAP = 100
"""Resamples for the standard error of metrics that have no formula for it."""


class Evaluator:
    """Some tasks, loaded once, to be scored again and again on a live model."""

    def __init__(self, tasks: Sequence[Task], protocol: Protocol, search_path: Sequence[Path] = ()) -> None:
        """Load the tasks. Raises TaskError for an unknown task or metric, and for a task without questions.

        `search_path` are folders with the user's own task files; lm-eval's built-in tasks are looked at only
        when a name is not found there.
        """
        self.tasks, self.protocol = tasks, protocol
        names = [task.name for task in tasks]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise TaskError(f"tasks: {', '.join(sorted(repeated))} is listed twice; give it one line with its weight")
        with quiet():
            self._loaded: Any = _load(names, [*search_path])
        leaves: dict[str, Any] = self._loaded["tasks"]
        for task in tasks:
            _check_metric(task, self._loaded)
        self._counted = {leaf: task.metric.split(",", 1) for task in tasks for leaf in _members(task, self._loaded)}
        asked = {name: chosen(name, leaf, protocol) for name, leaf in leaves.items()}
        self.blocks = blocks(asked, protocol.blocks if self.raceable else 1)
        """Which questions are asked together: {task: places} of each part."""
        for leaf in leaves.values():
            if protocol.num_fewshot is not None and leaf.get_config("num_fewshot") != 0:
                leaf.set_config(key="num_fewshot", value=protocol.num_fewshot)
            elif leaf.get_config("num_fewshot") is None:
                leaf.set_config(key="num_fewshot", value=0)
            leaf.set_fewshot_seed(seed=protocol.seed)
            _build_once(leaf)

    @property
    def raceable(self) -> bool:
        """Whether a part of the questions says something of all: every counted metric is a mean over questions."""
        leaves: dict[str, Any] = self._loaded["tasks"]
        return all(
            task.name in leaves and leaves[task.name].aggregation().get(task.metric.split(",")[0]) is mean
            for task in self.tasks
        )

    @property
    def weights(self) -> dict[str, float]:
        """What each task counts in the objective."""
        return {task.name: task.weight for task in self.tasks}

    @property
    def items(self) -> int:
        """Questions that one scoring answers."""
        return sum(len(places) for block in self.blocks for places in block.values())

    def questions(self) -> Iterator[tuple[str, str]]:
        """(task, text) of every question: what must not stand in two sets."""
        for name, leaf, document in self._documents():
            yield name, str(leaf.doc_to_text(document))

    def _documents(self) -> Iterator[tuple[str, Any, Any]]:
        """Task by task, in the order in which they are asked."""
        for name, leaf in self._loaded["tasks"].items():
            documents = leaf.eval_docs
            for block in self.blocks:
                for place in block.get(name, ()):
                    yield name, leaf, documents[place]

    @property
    def digest(self) -> str:
        """Of all that is asked, how, and what counts of it.

        The seed belongs to it only where solved examples are drawn with it: what it shuffles shows in the questions.
        """
        examples = [leaf.get_config("num_fewshot") for leaf in self._loaded["tasks"].values()]
        protocol = {**asdict(self.protocol), "seed": self.protocol.seed if any(examples) else None, "shuffle": None}
        for shown in ("share", "after", "blocks"):
            del protocol[shown]
        asked = [[task.model_dump() for task in self.tasks], protocol, examples, sorted(self.questions())]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    def texts(self) -> dict[str, list[tuple[str, str]]]:
        """{task: (question, right answer) of each}, shortened: for people."""
        found: dict[str, list[tuple[str, str]]] = {}
        for name, leaf, document in self._documents():
            found.setdefault(name, []).append((str(leaf.doc_to_text(document))[-TEXT:], _answer(leaf, document)))
        return found

    def read(self) -> Iterator[str]:
        """Roughly what a model reads: each question once, solved examples and choices included. For forecasts."""
        for _, leaf, document in self._documents():
            choices = leaf.doc_to_choice(document) if leaf.config.doc_to_choice is not None else []
            examples = 1 + int(leaf.get_config("num_fewshot") or 0)
            yield str(leaf.doc_to_text(document)) * examples + "".join(f" {choice}" for choice in choices)

    def score(self, lm: LM) -> Score:
        """Ask everything and weigh it. Raises CandidateError when a task fails or a metric is not a number."""
        return joined(self.tasks, [self.score_block(lm, place) for place in range(len(self.blocks))])

    def race(self, lm: LM, rival: Score, error_rate: float) -> Score:
        """Ask part by part, and stop once the model cannot get ahead of the rival on all questions; see `racing`.

        The score of one that was stopped is the rival's and the difference on what both were asked.
        """
        score = self.score_block(lm, 0)
        parts = [score]
        while len(parts) < len(self.blocks):
            gap = difference(score.item_scores, rival.item_scores, self.weights)
            if beaten(gap, len(parts), len(self.blocks), error_rate):
                return replace(score, total=rival.total + gap.mean)
            parts.append(self.score_block(lm, len(parts)))
            score = joined(self.tasks, parts)
        return score

    def score_block(self, lm: LM, place: int) -> Score:
        """Ask one part of the questions; see `score`."""
        protocol, block = self.protocol, self.blocks[place]
        for leaf in self._loaded["tasks"].values():
            # A task draws its examples from one generator that runs on: every candidate must see the same ones.
            leaf.set_fewshot_seed(seed=protocol.seed)
        try:
            with quiet():
                results: Any = evaluator.evaluate(
                    lm=lm,
                    task_dict=self._loaded,
                    samples=block,
                    bootstrap_iters=BOOTSTRAP,
                    apply_chat_template=protocol.apply_chat_template,
                    fewshot_as_multiturn=protocol.fewshot_as_multiturn and protocol.apply_chat_template,
                )
        except (LlmevoError, KeyboardInterrupt):
            raise
        except Exception as error:  # a task is anybody's code: whatever it raises costs the candidate, not the run
            raise CandidateError(f"scoring failed: {type(error).__name__}: {error}") from error
        items = sum(len(places) for places in block.values())
        score = weigh(self.tasks, results["results"] | (results.get("groups") or {}), items)
        return replace(
            score, item_scores=self._item_scores(results["samples"]), replies=self._replies(results["samples"])
        )

    def _item_scores(self, samples: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
        """The counted metric question by question, where it is a number."""
        found: dict[str, list[float]] = {}
        for name, (metric, filter_) in self._counted.items():
            values = [sample.get(metric) for sample in samples[name] if sample["filter"] == filter_]
            if values and all(isinstance(value, float | int) for value in values):
                # As the log has them, so that what follows from them is the same when it is read again.
                found[name] = [round(float(value), 4) for value in values if value is not None]
        return found

    def _replies(self, samples: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
        """What was answered, in words."""
        return {
            name: [_reply(self._loaded["tasks"][name], s) for s in samples[name] if s["filter"] == filter_]
            for name, (_, filter_) in self._counted.items()
        }


def weigh(tasks: Sequence[Task], results: Mapping[str, Mapping[str, Any]], items: int) -> Score:
    """The objective: Σ weight · metric, and its standard error from independent tasks."""
    total, variance = 0.0, 0.0
    metrics: dict[str, dict[str, float]] = {}
    for task in tasks:
        found = {key: float(value) for key, value in results[task.name].items() if isinstance(value, float | int)}
        value = found.get(task.metric, math.nan)
        if not math.isfinite(value):
            raise CandidateError(f"the metric {task.metric} of {task.name} is {value}, not a number")
        total += task.weight * value
        name, _, filter_ = task.metric.partition(",")
        stderr = found.get(f"{name}_stderr,{filter_}", 0.0)
        variance += (task.weight * stderr) ** 2 if math.isfinite(stderr) else 0.0
        metrics[task.name] = {key: value for key, value in found.items() if math.isfinite(value) and key != "alias"}
    return Score(total=total, stderr=math.sqrt(variance), tasks=metrics, items=items)


def joined(tasks: Sequence[Task], parts: Sequence[Score]) -> Score:
    """The score on several parts together, as if they had been asked at once. Of means over questions only."""
    if len(parts) == 1:
        return parts[0]
    item_scores = {name: [v for part in parts for v in part.item_scores[name]] for name in parts[0].item_scores}
    replies = {name: [r for part in parts for r in part.replies[name]] for name in parts[0].replies}
    results: dict[str, dict[str, float]] = {}
    for task in tasks:
        counts = np.array([len(part.item_scores[task.name]) for part in parts], dtype=float)
        shares = counts / counts.sum()
        for key in parts[0].tasks[task.name]:
            values = np.array([part.tasks[task.name].get(key, math.nan) for part in parts])
            # A standard error falls with the number of questions; the counted metric's follows from its questions.
            is_error = "_stderr," in key
            value = math.sqrt(float((shares**2 * values**2).sum())) if is_error else float((shares * values).sum())
            results.setdefault(task.name, {})[key] = value
        metric, _, filter_ = task.metric.partition(",")
        own = item_scores[task.name]
        results[task.name][task.metric] = sum(own) / len(own)
        results[task.name][f"{metric}_stderr,{filter_}"] = float(np.std(own, ddof=1) / math.sqrt(len(own)))
    return replace(weigh(tasks, results, sum(map(len, item_scores.values()))), item_scores=item_scores, replies=replies)


@contextmanager
def quiet() -> Generator[None]:
    """Keep lm-eval's and datasets' progress bars and remarks out of the display; errors are raised, not printed."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    levels = [logger.level for logger in loggers]
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with redirect_stderr(StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _load(names: list[str], search_path: list[Path]) -> Any:
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


def _build_once(leaf: Any) -> None:
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


def _members(task: Task, loaded: Any) -> list[str]:
    """The tasks of a group, or the task itself."""
    if task.name in loaded["tasks"]:
        return [task.name]
    return [leaf.task_name for leaf in loaded["groups"][task.name].get_all_tasks()]


def _answer(leaf: Any, document: Any) -> str:
    """The right answer of a question, in words."""
    target = leaf.doc_to_target(document)
    if isinstance(target, int) and leaf.config.doc_to_choice is not None:
        target = leaf.doc_to_choice(document)[target]
    return str(target)[:TEXT]


def _reply(leaf: Any, sample: Mapping[str, Any]) -> str:
    """What a model answered to a question: its text, or the choice it found likeliest."""
    found = sample["filtered_resps"]
    if leaf.OUTPUT_TYPE == "multiple_choice":
        choices = leaf.doc_to_choice(sample["doc"])
        return str(choices[max(range(len(choices)), key=lambda place: found[place][0])])[:TEXT]
    return str(found[0])[:TEXT] if leaf.OUTPUT_TYPE == "generate_until" else ""


def _check_metric(task: Task, loaded: Any) -> None:
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
