"""A text as a task: how well a model predicts it."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

from llmevo.errors import TaskError
from llmevo.evaluation.tasks.task import Task

DOCUMENT = 2048
"""Bytes a document has about: a page, 400 to 800 tokens."""


ENDS = (r"\n\s*\n", r"\n", r"[.!?。！？]\s+", r"\s+")
"""Where a text may be cut, the best first: after a paragraph, a line, a sentence, a word."""


def build_text(task: Task, root: Path, _: Any) -> Any:
    """The task of a line with `text:`. Its metric is the mean over documents of bits per byte, -log₂ p / bytes: lower
    is better. With documents of about one size that is the text's own bits per byte, and it can be raced.

    A document longer than the model's context is read in windows, as lm-eval does (`loglikelihood_rolling`).

    Raises TaskError when the file is not there, not UTF-8, or empty.
    """
    assert task.text is not None
    documents = cut(read_text(task.name, root / task.text))

    def load(**_: Any) -> Any:
        return {"test": datasets.Dataset.from_dict({"text": documents})}

    config: dict[str, Any] = {
        "task": task.name,
        "custom_dataset": load,
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": _text,
        "process_results": bits_per_byte,
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "mean", "higher_is_better": False}],
        "num_fewshot": 0,
    }
    return ConfigurableTask(config=config)


def read_text(name: str, file: Path) -> str:
    """What is in a file. Raises TaskError."""
    try:
        found = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise TaskError(f"tasks: {name}: there is no file {file}; `text:` starts at the config's folder") from None
    except UnicodeDecodeError as error:
        raise TaskError(f"tasks: {name}: {file} is not UTF-8 ({error}); save it as UTF-8") from None
    except OSError as error:
        raise TaskError(f"tasks: {name}: {file} cannot be read ({error})") from error
    if not found.strip():
        raise TaskError(f"tasks: {name} has no questions: {file} is empty")
    return found


def bits_per_byte(document: Mapping[str, str], results: Sequence[float]) -> dict[str, float]:
    """Of one document, from its log-likelihood in nats."""
    (likelihood,) = results
    return {"bits_per_byte": -likelihood / math.log(2) / len(document["text"].encode())}


def cut(text: str, size: int = DOCUMENT) -> list[str]:
    """A text in documents of about one size, in bytes, cut between paragraphs; of longer ones between lines, sentences
    or words, and only of what has none of these anywhere.
    """
    text = text.strip()
    documents: list[str] = []
    count = max(1, round(len(text.encode()) / size))
    while count > 1:
        wanted = round(len(text) / count)
        place = _end(text, wanted)
        documents.append(text[:place].strip())
        text, count = text[place:].strip(), count - 1
    return [document for document in (*documents, text) if document]


def _end(text: str, wanted: int) -> int:
    """The best place to cut near a place: of the best kind there is within half a document, the nearest."""
    low, high = wanted // 2, wanted + wanted // 2
    for kind in ENDS:
        places = [found.end() for found in re.finditer(kind, text[low:high])]
        if places:
            return low + min(places, key=lambda place: abs(low + place - wanted))
    return wanted


def _text(document: Mapping[str, str]) -> str:
    return document["text"]
