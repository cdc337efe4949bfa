"""Tasks that are prompts of the user's own, on which candidates write."""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from llmevo.errors import TaskError
from llmevo.evaluation.judges.memory import VerdictMemory
from llmevo.evaluation.judges.poll import AskVoter
from llmevo.evaluation.tasks.task import Task


class Writing(ConfigurableTask):
    """A task whose replies are judged all together once they are written, and not one by one.

    lm-eval filters all replies of a task before it looks at any of them for its metrics: `consider` is called there.
    Requests to a judge can then go out in parallel, and a person can be shown any of them.
    """

    book: VerdictMemory = VerdictMemory()
    """Of the run that is scored; see `Evaluator.consult`."""
    booth: AskVoter | None = None
    """Where a person votes."""
    seed = 0
    """What is drawn follows from it."""

    texts: Mapping[str, str] = {}
    """What those who judge are told, for the log: name and text."""

    def __init__(self, config: dict[str, Any]) -> None:
        # lm-eval looks metrics up by their names unless the config says what a result is. A function and no method, for
        # lm-eval copies configs with all that is in them.
        super().__init__(config=config | {"process_results": lambda doc, results: self.result(doc, results)})

    def check(self) -> None:
        """Find out before a run starts whether there is anybody to ask. Raises UserError if not."""

    def inquiries(self, document: Mapping[str, str]) -> int:
        """How often an LLM is asked about a reply to it. For forecasts."""
        return 0

    def apply_filters(self) -> Any:
        done = super().apply_filters()
        instances: Any = self.instances
        self.consider([(instance.doc, str(instance.filtered_resps["none"])) for instance in instances])
        return done

    @abstractmethod
    def consider(self, written: list[tuple[Mapping[str, str], str]]) -> None:
        """Every document with what a candidate wrote on it."""

    @abstractmethod
    def result(self, document: Mapping[str, str], replies: Sequence[str]) -> dict[str, Any]:
        """The metrics of one document, once all were considered."""


def config_of(task: Task, rows: list[dict[str, str]], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """lm-eval's config of a task that asks these prompts."""
    options = task.judge or task.votes
    assert options

    def load(**_: Any) -> Any:
        return {"test": datasets.Dataset.from_list(rows)}

    return {
        "task": task.name,
        "custom_dataset": load,
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": _prompt,
        "doc_to_target": _reference,
        "generation_kwargs": {"until": [], "max_gen_toks": options.reply_tokens, "do_sample": False},
        "metric_list": metrics,
        "num_fewshot": 0,
    }


def read_prompts(name: str, file: Path) -> list[dict[str, str]]:
    """The prompts in a file, each with its reference reply (empty where there is none): JSON Lines with `prompt` and
    perhaps `reference` where its name ends with .jsonl, else a prompt a line. Raises TaskError with the line.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise TaskError(f"tasks: {name}: there is no file {file}; `prompts:` starts at the config's folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"tasks: {name}: {file} cannot be read ({error})") from error
    rows: list[dict[str, str]] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"tasks: {name}: {file}:{number}"
            rows.append(_row(line, place) if file.suffix == ".jsonl" else {"prompt": line.strip(), "reference": ""})
    if not rows:
        raise TaskError(f"tasks: {name} has no questions: {file} is empty")
    return rows


def _row(line: str, place: str) -> dict[str, str]:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise TaskError(f"{place}: is not JSON ({error}); write one object a line, or plain lines in a .txt") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise TaskError(f'{place}: has no `prompt`; write {{"prompt": "…"}}, and a "reference" if you like')
    reference = row.get("reference")
    if reference is not None and not isinstance(reference, str):
        raise TaskError(f"{place}: its `reference` is {reference!r}; give a text, a reply to compare others with")
    return {"prompt": row["prompt"], "reference": reference or ""}


def _prompt(document: Mapping[str, str]) -> str:
    return document["prompt"]


def _reference(document: Mapping[str, str]) -> str:
    return document["reference"]
