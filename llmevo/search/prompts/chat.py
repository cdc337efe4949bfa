"""For chat models, reasoning or not: what they can use and a numeric optimizer cannot, answered in JSON.

The prompt is made anew each time and keeps within a number of tokens, whatever the run has come to.
"""

import json

from llmevo.llm.templates import Templates
from llmevo.search.evidence import estimate_effects
from llmevo.search.prompts.detail import DETAILS, TOKENS, tokens
from llmevo.search.prompts.question import Prompt, Question
from llmevo.search.prompts.reading import answer_model, read
from llmevo.search.prompts.table import GeneTable
from llmevo.search.prompts.variables import variables

__all__ = ["FILES", "answer_model", "ask", "read"]


FILES = ("chat_system.j2", "chat_user.j2", "repair.j2")
"""The question, and what is said when its answer cannot be used."""


def ask(question: Question, templates: Templates, seed: int) -> Prompt:
    """The prompt for a chat model, in as much detail as fits into `TOKENS`."""
    sheet, evidence = GeneTable.of(question.space, seed), estimate_effects(question)
    schema = answer_model(question, sheet).model_json_schema()
    texts: list[str] = []
    for detail in DETAILS:
        shown = {**variables(question, sheet, evidence, detail), "schema": json.dumps(schema)}
        texts = [templates.render(file, **shown) for file in FILES[:2]]
        if sum(map(tokens, texts)) <= TOKENS:
            break
    return Prompt(
        tuple({"role": role, "content": text} for role, text in zip(("system", "user"), texts, strict=True)),
        read=lambda text: read(text, question, sheet, evidence),
        schema=schema,
        generation=question.generation,
        seed=seed,
        question=question,
    )
