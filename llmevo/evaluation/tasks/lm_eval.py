"""The adapter to lm-eval: its task manager and its task objects.

No other module reads lm-eval's private attributes. A leaf is one of lm-eval's task objects, of a single task; a line of
`tasks:` may name a group of several.
"""

import logging
import re
from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from functools import lru_cache
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

import datasets
from lm_eval import utils
from lm_eval.api import metrics
from lm_eval.api.metrics import mean, sample_stddev
from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_AGGREGATION_REGISTRY
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.task import TaskConfig
from lm_eval.filters import build_filter_ensemble
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._yaml_loader import load_yaml

from llmevo.errors import CandidateError, LlmevoError, TaskError, machine_error, nearest, plural
from llmevo.evaluation.judges.verdicts import VerdictMemory
from llmevo.evaluation.responses import Unjudged
from llmevo.evaluation.tasks.files import (
    SUFFIX,
    Config,
    files_of,
    leaves,
    locate_data,
    near,
    scored_split,
    training_changes,
)
from llmevo.evaluation.tasks.task import Task

_template = lru_cache(1024)(utils.env.from_string)


def _apply_template(template: str, doc: dict[str, Any]) -> str:
    """As lm-eval's own, which compiles the template again for every question; that takes a millisecond."""
    return _template(template).render(**doc)


utils.apply_template = _apply_template


def _bootstrap_stderr(metric: Callable[[Sequence[Any]], float], values: Sequence[Any], iters: int) -> float:
    """As lm-eval's own for up to 1,000 resamples, which forks processes for it, beside this one's threads and GPU."""
    random = Random(0)
    return sample_stddev([metric(random.choices(values, k=len(values))) for _ in range(iters)])


metrics.bootstrap_stderr = _bootstrap_stderr

TEXT = 600
"""Characters that are kept of a question (its end), an answer and a reply (their beginnings)."""

SHOWN = 60
"""Characters of a question in an error."""


@contextmanager
def quiet() -> Generator[None]:
    """Keep lm-eval's and datasets' progress bars and remarks out of the display; errors are raised, not printed."""
    every = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets")]
    loggers = [logger for logger in every if logger.level != logging.ERROR]  # a change takes about a millisecond
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


# The task manager


def task_manager(search_path: Sequence[Path], built_in: bool = True) -> Any:
    """lm-eval's manager of the tasks of some folders, and of its own with `built_in` (which takes ten seconds).

    Relative files of data, in a task file of the user's, start at that file's folder where they exist, else at the
    current folder, as in lm-eval. A split that the data do not have is a TaskError that names the splits.
    """
    manager: Any = TaskManager(include_path=[*search_path] or None, include_defaults=built_in)
    manager._factory = _Factory(meta=None)
    for entry in manager.task_index.values():
        if entry.cfg and entry.yaml_path:
            entry.cfg = locate_data(entry.cfg, Path(entry.yaml_path))
    return manager


def check_readable(name: str, search_path: Sequence[Path]) -> None:
    """Raise TaskError where a task is in no index because lm-eval ignores its file, which cannot be read."""
    for folder in search_path:
        for file in files_of(name, folder):
            try:
                load_yaml(file, resolve_func=False)
            except Exception as error:
                reason = " ".join(str(error).split())
                raise TaskError(f"tasks: {name}: {file} cannot be read ({type(error).__name__}: {reason})") from error


def on_training_split(name: str, manager: Any) -> Any:
    """A new leaf of the name `X_train`; see `training_changes`. Raises TaskError where X is not a single task, or has
    no such split.
    """
    original = name.removesuffix(SUFFIX)
    entry = manager.task_index[original]
    if entry.kind.name in ("GROUP", "TAG"):
        singles = ", ".join(f"{leaf}{SUFFIX}" for leaf, _ in leaves(original, manager.task_index))
        raise TaskError(
            f"tasks: {original} is a {entry.kind.name.lower()}, and {SUFFIX} is for single tasks; list {singles}"
        )
    changes = training_changes(name, original, entry.cfg or {})
    return manager._factory.build(entry, overrides=changes, registry=manager.task_index)


class _Factory(TaskFactory):
    """Builds tasks from their files."""

    def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        config = super()._load_full_config(entry, overrides)
        return {**locate_data(config, Path(entry.yaml_path))} if entry.yaml_path else config

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        config = self._load_full_config(entry, overrides)
        if "class" in config:
            return super()._build_task(entry, overrides)
        _check_config(entry.name, config)
        return _FileTask(config={key: of for key, of in config.items() if key not in ("tag", "group", "task_list")})


def _check_config(name: str, config: Config) -> None:
    """Raise TaskError for words of a task file that lm-eval ignores, or fails at without naming them."""
    fields = {*TaskConfig.__dataclass_fields__, "tag", "group", "task_list"}
    for key in config.keys() - fields:
        raise TaskError(f"tasks: {name}: its file has an unknown key {key!r}{nearest(str(key), sorted(fields))}")
    for key, what in (("doc_to_text", "question"), ("doc_to_target", "right answer")):
        if config.get(key) is None and not config.get("use_prompt"):
            raise TaskError(
                f"tasks: {name}: its file has no {key!r}, which gives the {what}; where there is none, write {key}: ''"
            )
    metrics: Any = config.get("metric_list") or []
    if not isinstance(metrics, list) or not all(isinstance(entry, Mapping) and "metric" in entry for entry in metrics):
        raise TaskError(
            f"tasks: {name}: its metric_list is {metrics!r}; write a list such as [{{metric: acc, aggregation: mean,"
            " higher_is_better: true}]"
        )
    for entry in metrics:
        metric, aggregation = entry.get("metric"), entry.get("aggregation")
        if isinstance(aggregation, str) and aggregation not in AGGREGATION_REGISTRY:
            raise TaskError(
                f"tasks: {name}: its file has an unknown aggregation {aggregation!r}"
                f"{nearest(aggregation, AGGREGATION_REGISTRY)}"
            )
        if aggregation is None and isinstance(metric, str) and metric not in METRIC_AGGREGATION_REGISTRY:
            hint = nearest(metric, METRIC_AGGREGATION_REGISTRY)
            raise TaskError(
                f"tasks: {name}: unknown metric {metric!r}{hint}; a metric of your own needs an `aggregation`"
            )


class _FileTask(ConfigurableTask):
    """A task whose missing splits are errors that name the splits of its data."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().download(dataset_kwargs, **kwargs)
        found: Any = self.dataset
        if isinstance(found, datasets.DatasetDict):
            self.dataset = _Splits(found)
            self.dataset.config = self.config


class _Splits(datasets.DatasetDict):
    config: Any = None

    def __missing__(self, split: str) -> Any:
        keys = ("fewshot_split", "training_split", "validation_split", "test_split")
        key = next((key for key in keys if getattr(self.config, key) == split), "fewshot_config")
        raise TaskError(
            f"tasks: {self.config.task} has no split {split!r}, which its `{key}` names; its data have"
            f" {', '.join(map(repr, self))}"
        )


# Tasks that a line of the config describes


def config_of_rows(name: str, rows: Sequence[Mapping[str, str]], **keys: Any) -> dict[str, Any]:
    """lm-eval's config of a task whose questions are these rows, without solved examples."""

    def load(**_: Any) -> Any:
        return {"test": datasets.Dataset.from_list([{**row} for row in rows])}

    return {"task": name, "custom_dataset": load, "test_split": "test", "num_fewshot": 0, **keys}


def task_of_rows(name: str, rows: Sequence[Mapping[str, str]], **keys: Any) -> Any:
    """A leaf by such a config."""
    return ConfigurableTask(config=config_of_rows(name, rows, **keys))


class JudgedTask(ConfigurableTask):
    """A task whose replies are judged together once all are written.

    lm-eval filters all replies of a task before it computes metrics of any: `consider` is called there. Requests to a
    judge can then be sent in parallel, and a person can be shown any reply.
    """

    verdicts: VerdictMemory | None
    """None where replies are judged in another process."""
    seed: int
    """Seeds random choices. The evaluator that loads the task sets both."""
    texts: Mapping[str, str] = {}
    """{name: text} of the instructions of judges, for the log."""

    def __init__(self, config: dict[str, Any]) -> None:
        # lm-eval looks metrics up by their names unless the config has `process_results`: a function and no method, for
        # lm-eval copies configs with all that is in them.
        super().__init__(config=config | {"process_results": lambda doc, results: self.result(doc, results)})

    def open(self) -> None:
        """Prepare to judge. Raises UserError without a judge's key."""

    def check(self) -> None:
        """Raise UserError before a run starts where replies cannot be judged."""

    def inquiries(self, document: Mapping[str, str]) -> int:
        """Requests to an LLM for a reply to this prompt. For forecasts."""
        return 0

    def apply_filters(self) -> Any:
        done = super().apply_filters()
        instances: Any = self.instances
        if self.verdicts is None:
            raise Unjudged
        self.consider([(instance.doc, str(instance.filtered_resps["none"])) for instance in instances], self.verdicts)
        return done

    @abstractmethod
    def consider(self, written: list[tuple[Mapping[str, str], str]], verdicts: VerdictMemory) -> None:
        """Judge every document's reply."""

    @abstractmethod
    def result(self, document: Mapping[str, str], replies: Sequence[str]) -> dict[str, Any]:
        """The metrics of one document, after `consider`."""


def set_metric(leaf: Any, task: str, metric: str, score: Callable[[Mapping[str, Any], str], float]) -> None:
    """Rename a leaf that writes replies, and score each unfiltered reply by a function of document and reply; the
    metric is their mean.
    """

    def process_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        return {metric: score(document, results[0])}

    leaf.set_config("task", task)
    leaf.set_config("process_results", process_results)
    leaf.set_config("metric_list", [{"metric": metric, "aggregation": "mean", "higher_is_better": True}])
    leaf.set_config("filter_list", None)
    leaf._filters = [build_filter_ensemble("none", [("take_first", None)])]
    leaf._metric_fn_list, leaf._metric_fn_kwargs = {metric: None}, {metric: {}}
    leaf._aggregation_list, leaf._higher_is_better = {metric: mean}, {metric: True}


# Metrics


def members(task: Task, loaded: Any) -> dict[str, Any]:
    """The leaves of a group, or the task's own, by name."""
    if task.name in loaded["tasks"]:
        return {task.name: loaded["tasks"][task.name]}
    return {leaf.task_name: leaf for leaf in loaded["groups"][task.name].get_all_tasks()}


def check_metric(task: Task, loaded: Any) -> None:
    """Raise TaskError unless the task reports the metric."""
    singles, group = loaded["tasks"], loaded["groups"].get(task.name)
    if task.name not in singles and (group is None or not group.has_aggregation):
        kind = "tag" if group is None else "group that aggregates nothing"
        raise TaskError(
            f"tasks: {task.name} is a {kind} and has no score of its own; list its tasks instead"
            f" ({', '.join(sorted(singles))})"
        )
    reported = {
        (metric, filter_.name)
        for leaf in members(task, loaded).values()
        for metric in leaf.aggregation()
        for filter_ in leaf._filters
    }
    if group is not None:
        aggregated = {entry.metric: entry.filter_list for entry in group.aggregate_metric_list}
        reported = {(m, f) for m, f in reported if m in aggregated and f in (aggregated[m] or [f])}
    metrics = sorted(f"{metric},{filter_}" for metric, filter_ in reported)
    if task.metric not in metrics:
        raise TaskError(
            f"tasks: {task.name} has no metric {task.metric!r}{near(task.metric, metrics)};"
            f" its metrics are {', '.join(map(repr, metrics))}"
        )


def mean_metrics(leaf: Any) -> set[str]:
    """The metrics that are means over questions."""
    return {metric for metric, aggregate in leaf.aggregation().items() if aggregate is mean}


def is_size_weighted(task: Task, loaded: Any) -> bool:
    """Whether a group's metric is the mean over all questions of its tasks, and not over the tasks."""
    metric = task.metric.split(",")[0]
    return any(of.weight_by_size for of in loaded["groups"][task.name].aggregate_metric_list if of.metric == metric)


# Scoring


def check_examples(leaf: Any) -> None:
    """Raise TaskError where a task has fewer solved examples than it is to show: lm-eval would find that out with the
    first question that it asks, of held-out tasks at the end of a run.
    """
    count = leaf.get_config("num_fewshot")
    if count and (found := len(leaf.sampler.fewshot_docs())) < count:
        raise TaskError(
            f"tasks: {leaf.task_name} has {plural(found, 'solved example')}, fewer than num_fewshot: {count};"
            " lower num_fewshot, or name another `fewshot_split` in the task's file"
        )


def exclude_own_question(leaf: Any) -> bool:
    """Let lm-eval leave a question out of its own solved examples, where these come from the split that is scored;
    return whether it would not do so itself: it compares the names in the task's file only.

    Raises TaskError for a split with too few questions.
    """
    examples, config = leaf.fewshot_cfg, leaf.config
    source, scored = examples.split, scored_split(vars(config))
    if source is None and examples.samples is None:
        source = next((of for of in (config.training_split, config.validation_split) if of is not None), scored)
    count = leaf.get_config("num_fewshot")
    if not count or source is None or source != scored:
        return False
    if count >= len(leaf.eval_docs):
        raise TaskError(
            f"tasks: {leaf.task_name} has {plural(len(leaf.eval_docs), 'question')}, too few for num_fewshot: {count},"
            " as its solved examples come from the other questions; lower num_fewshot, or name another `fewshot_split`"
            " in the task's file"
        )
    excluded, examples.split = examples.split == config.test_split, config.test_split
    return not excluded


def cache_requests(leaf: Any) -> None:
    """Let a leaf keep the requests it builds: they are equal for every candidate, and solved examples take seconds."""
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


def _number(metric: str, value: Any) -> float:
    """A metric of one question as Python's own number: tasks may give those of NumPy and torch."""
    if not isinstance(value, str | bytes):
        with suppress(TypeError, ValueError, RuntimeError):
            return float(value)
    raise TypeError(f"its metric {metric!r} is {value!r}, not a number")


def name_failing_questions(leaf: Any) -> None:
    """Let errors name the question at whose reply the task's own code fails, or gives a metric that has no mean."""
    process: Any = leaf.process_results
    averaged = mean_metrics(leaf)

    def process_results(document: Any, results: Any) -> Any:
        try:
            values: dict[str, Any] = {**process(document, results)}
            return values | {metric: _number(metric, values[metric]) for metric in averaged & {*values}}
        except LlmevoError:
            raise
        except Exception as error:
            if lost := machine_error(error, in_task=True):
                raise lost from error
            reason = f"{type(error).__name__}: {error}, for the question {end_of(question_text(leaf, document))}"
            raise CandidateError(f"the task {leaf.task_name} failed: {reason}") from error

    leaf.process_results = process_results


# Questions, answers and replies as texts


def end_of(text: str) -> str:
    """The end of a question, quoted, for an error: the end tells one question from another."""
    return repr(text if len(text) <= SHOWN else f"…{text[-SHOWN:]}")


def question_text(leaf: Any, document: Any) -> str:
    """The words that tell one question from another.

    lm-eval has no question for tasks that predict a whole text or compare sentences, and the number of the right choice
    for those that fill a gap: there it is the text itself, and the choices. Raises TaskError.
    """
    with _naming(leaf, document):
        text = leaf.doc_to_text(document)
        if leaf.OUTPUT_TYPE == "loglikelihood_rolling":
            return str(text) or str(leaf.doc_to_target(document))
        if isinstance(text, int) and leaf.config.doc_to_choice is not None:
            return " / ".join(map(str, leaf.doc_to_choice(document))) + f" … {leaf.doc_to_target(document)}"
        return str(text) or " / ".join(choices_of(leaf, document))


def null_column(leaf: Any, document: Any) -> str | None:
    """The first column without a value that the question shows, as `None`."""
    template = leaf.config.doc_to_text
    if not isinstance(template, str) or "None" not in lm_eval_text(leaf, document):
        return None
    shown = re.findall(r"{{[-\s]*(\w+)", template) or [template]
    return next((column for column in shown if column in document and document[column] is None), None)


def choices_of(leaf: Any, document: Any) -> list[str]:
    """The choices of a question; none where a reply is written. Raises TaskError."""
    if leaf.OUTPUT_TYPE != "multiple_choice" or leaf.config.doc_to_choice is None:
        return []
    with _naming(leaf, document):
        choices: list[Any] = [*leaf.doc_to_choice(document)]
        if any(choice is None for choice in choices):
            raise ValueError("one of its choices is null")
        return [*map(str, choices)]


def lm_eval_text(leaf: Any, document: Any) -> str:
    """lm-eval's own question, which may be empty or a number. Raises TaskError."""
    with _naming(leaf, document):
        return str(leaf.doc_to_text(document))


@contextmanager
def _naming(leaf: Any, document: Any) -> Generator[None]:
    """Name the task and the document in errors of the task's own functions."""
    try:
        yield
    except TaskError:  # it names them already
        raise
    except Exception as error:
        raise TaskError(
            f"tasks: {leaf.task_name}: the question of a document cannot be written ({type(error).__name__}: {error}):"
            f" {str(document)[:SHOWN]}"
        ) from error


def answer_text(leaf: Any, document: Any) -> str:
    """The right answer of a question, shortened. Raises TaskError for one that is none of the question's choices:
    lm-eval counts every answer to it as wrong.
    """
    with _naming(leaf, document):
        target = leaf.doc_to_target(document)
        choices = leaf.doc_to_choice(document) if leaf.config.doc_to_choice is not None else None
    if choices is None or isinstance(target, list):
        return str(target)[:TEXT]
    if target not in (range(len(choices)) if isinstance(target, int) else choices):
        if leaf.OUTPUT_TYPE != "multiple_choice" or getattr(leaf, "multiple_input", False):
            return str(target)[:TEXT]  # it is no number of a choice
        raise TaskError(
            f"tasks: {leaf.task_name}: the right answer {target!r} is none of the {len(choices)} choices (numbers count"
            f" from 0) of the question {end_of(question_text(leaf, document))}; correct its data or its doc_to_target"
        )
    return str(choices[target] if isinstance(target, int) else target)[:TEXT]


def reply_text(leaf: Any, sample: Mapping[str, Any]) -> str:
    """A model's reply, shortened: its text, or the likeliest choice."""
    found = sample["filtered_resps"]
    if leaf.OUTPUT_TYPE == "multiple_choice":
        choices = leaf.doc_to_choice(sample["doc"])
        return str(choices[max(range(len(choices)), key=lambda place: found[place][0])])[:TEXT]
    return str(found[0])[:TEXT] if leaf.OUTPUT_TYPE == "generate_until" else ""
