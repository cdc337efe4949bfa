"""A text as a task, scored by how well a model predicts it: a line with `text: FILE`."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmevo.errors import TaskError
from llmevo.evaluation.tasks.lm_eval import task_of_rows
from llmevo.evaluation.tasks.task import Task

DOCUMENT = 2048
"""Bytes a document has about: a page, 400 to 800 tokens."""

ENDS = (r"\n\s*\n", r"\n", r"[.!?。！？]\s+", r"\s+")
"""Places to cut a text, the best first: after a paragraph, a line, a sentence, a word."""


def build_text(task: Task, root: Path, _: Any) -> Any:
    """The leaf of a line with `text:`. Its metric is the mean over documents of bits per byte, -log₂ p / bytes: lower
    is better. With documents of about one size that is the text's own bits per byte, and it can be raced.

    A document longer than the model's context is read in windows, as lm-eval does (`loglikelihood_rolling`).

    Raises TaskError when the file does not exist, is not UTF-8, or is empty.
    """
    file = root / str(task.text)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise TaskError(f"tasks: {task.name}: there is no file {file}; `text:` starts at the config's folder") from None
    except UnicodeDecodeError as error:
        raise TaskError(f"tasks: {task.name}: {file} is not UTF-8 ({error}); save it as UTF-8") from None
    except OSError as error:
        raise TaskError(f"tasks: {task.name}: {file} cannot be read ({error})") from error
    if not text.strip():
        raise TaskError(f"tasks: {task.name} has no questions: {file} is empty")
    return task_of_rows(
        task.name,
        [{"text": document} for document in cut(text)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        process_results=_bits_per_byte,
        metric_list=[{"metric": "bits_per_byte", "aggregation": "mean", "higher_is_better": False}],
    )


def _bits_per_byte(document: Mapping[str, str], results: Sequence[float]) -> dict[str, float]:
    """Return the bits per byte of one document, from its log-likelihood in nats."""
    (likelihood,) = results
    return {"bits_per_byte": -likelihood / math.log(2) / len(document["text"].encode())}


def cut(text: str) -> list[str]:
    """Cut a text into documents of about `DOCUMENT` bytes between paragraphs; a longer paragraph between lines,
    sentences or words, and anywhere only where it has none of these.
    """
    text = text.strip()
    documents: list[str] = []
    start = 0
    for count in range(max(1, round(len(text.encode()) / DOCUMENT)), 1, -1):
        end = start + _best_end(text, start, round((len(text) - start) / count))
        documents.append(text[start:end].strip())
        start = end
        while start < len(text) and text[start].isspace():
            start += 1
    return [document for document in (*documents, text[start:]) if document]


def _best_end(text: str, start: int, wanted: int) -> int:
    """The place to cut, counted from `start`: the nearest one of the best kind that is within half a document of the
    wanted place.
    """
    low, high = wanted // 2, wanted + wanted // 2
    part = text[start + low : start + high]  # a pattern that is searched in the whole text may see what is before it
    for kind in ENDS:
        places = [found.end() for found in re.finditer(kind, part)]
        if places:
            return low + min(places, key=lambda place: abs(low + place - wanted))
    return wanted
