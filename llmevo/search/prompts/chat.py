"""The prompt for chat models, reasoning or not: facts that a numeric optimizer cannot use, answered in JSON.

It is made anew each time, and has a bounded number of tokens for any number of trials, genes, tasks and models.
"""

import json
import math
import re
from collections.abc import Iterable
from typing import Any

from llmevo.llm.client import LETTERS
from llmevo.llm.templates import Templates
from llmevo.search.prompts.question import Messages, Prompt, Question
from llmevo.search.prompts.reading import read
from llmevo.search.prompts.schema import answer_model
from llmevo.search.prompts.table import GeneTable
from llmevo.search.prompts.variables import DETAILS, Detail, Facts, Variables

FILES = ("chat_system.j2", "chat_user.j2", "repair.j2", "chat_short.j2")
"""The templates of the prompt, of the message about an answer that cannot be used, and of the short form."""

TOKENS = 8000  # of a whole prompt, at most, by an estimate from above (tokenizers count about 6500)
SHORT = 1500  # of a prompt in the short form, at most

PIECE = re.compile(r"[A-Za-z]+|[^\W_A-Za-z]|\n+|[^\S\n]+(?=[^A-Za-z])|[^\w\s]|_")
"""Words; digits and letters of other scripts; ends of lines; spaces that no word takes with it; signs."""


def tokens(text: str) -> int:
    """Estimate the tokens of a text from above: one for every digit and sign, and for four letters of a word."""
    return sum(_tokens(piece) for piece in PIECE.findall(text))


def _tokens(piece: str) -> int:
    if not piece.isascii():
        return len(piece.encode())
    return math.ceil(len(piece) / LETTERS) if piece[0].isalpha() else 1


def fitting(versions: Iterable[list[str]], most: int) -> list[str]:
    """Return the first of a prompt's versions, each the texts of its messages, that has at most so many tokens, else
    the last one.
    """
    texts: list[str] = []
    for texts in versions:
        if sum(map(tokens, texts)) <= most:
            break
    return texts


def ask(question: Question, templates: Templates, seed: int) -> Prompt:
    """Return the prompt for a chat model, in as much detail as fits."""
    table = GeneTable.of(question.space, seed)
    schema = answer_model(question, table).model_json_schema()
    return Prompt(
        Messages(lambda: _messages(question, templates, table, schema)),
        read=lambda text: read(text, question, table),
        schema=schema,
        generation=question.generation,
        seed=seed,
        question=question,
    )


def _messages(question: Question, templates: Templates, table: GeneTable, schema: Any) -> list[dict[str, str]]:
    facts, most = Facts(question), SHORT if question.short else TOKENS
    files = {"user": FILES[3]} if question.short else {"system": FILES[0], "user": FILES[1]}

    def written(detail: Detail) -> list[str]:
        variables = Variables(facts, table, detail).all()
        return [templates.render(file, **variables, schema=json.dumps(schema)) for file in files.values()]

    texts = fitting(map(written, DETAILS), most)
    return [{"role": role, "content": text} for role, text in zip(files, texts, strict=True)]
