"""What a question, its right answer and a reply are in words, for people."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from llmevo.errors import TaskError

TEXT = 600
"""Characters that are kept of a question (its end), an answer and a reply (their beginnings)."""


SHOWN = 60
"""Characters of a question in an error."""


def end_of(text: str) -> str:
    """The end of a question, quoted, for an error: what is asked stands there."""
    return repr(text if len(text) <= SHOWN else f"…{text[-SHOWN:]}")


def wording(leaf: Any, document: Any) -> str:
    """What is asked, in words: what tells one question from another.

    Tasks that predict a whole text ask nothing before it, and of those that fill a gap lm-eval's question is the number
    of the right choice; their texts are in what is predicted and in the choices. Raises TaskError.
    """
    with _naming(leaf, document):
        return _wording(leaf, document)


def plain(leaf: Any, document: Any) -> str:
    """What lm-eval itself calls the question, which may be empty or a number. Raises TaskError."""
    with _naming(leaf, document):
        return str(leaf.doc_to_text(document))


@contextmanager
def _naming(leaf: Any, document: Any) -> Generator[None]:
    """Say of what a task's functions raise, which are anybody's code, which task and document it was."""
    try:
        yield
    except Exception as error:
        raise TaskError(
            f"tasks: {leaf.task_name} cannot say its question ({type(error).__name__}: {error}) of the document"
            f" {str(document)[:SHOWN]}"
        ) from error


def _wording(leaf: Any, document: Any) -> str:
    text = leaf.doc_to_text(document)
    if leaf.OUTPUT_TYPE == "loglikelihood_rolling":
        return str(text) or str(leaf.doc_to_target(document))
    if isinstance(text, int) and leaf.config.doc_to_choice is not None:
        return " / ".join(map(str, leaf.doc_to_choice(document))) + f" … {leaf.doc_to_target(document)}"
    return str(text)


def answer(leaf: Any, document: Any) -> str:
    """The right answer of a question, in words. Raises TaskError for one that is none of the question's choices:
    lm-eval counts whatever a model answers to it as wrong.
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
            f" from 0) of the question {end_of(wording(leaf, document))}; mend its data or its doc_to_target"
        )
    return str(choices[target] if isinstance(target, int) else target)[:TEXT]


def reply(leaf: Any, sample: Mapping[str, Any]) -> str:
    """What a model answered to a question: its text, or the choice it found likeliest."""
    found = sample["filtered_resps"]
    if leaf.OUTPUT_TYPE == "multiple_choice":
        choices = leaf.doc_to_choice(sample["doc"])
        return str(choices[max(range(len(choices)), key=lambda place: found[place][0])])[:TEXT]
    return str(found[0])[:TEXT] if leaf.OUTPUT_TYPE == "generate_until" else ""
