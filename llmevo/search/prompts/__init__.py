"""The prompting styles; an LLM client names the one that suits its model."""

from collections.abc import Callable
from dataclasses import dataclass

from llmevo.llm.templates import Templates
from llmevo.search.prompts import chat, completion
from llmevo.search.prompts.question import Prompt, Question


@dataclass(frozen=True)
class Style:
    """A wording and its template files."""

    ask: Callable[[Question, Templates, int], Prompt]
    files: tuple[str, ...]


STYLES = {"chat": Style(chat.ask, chat.FILES), "completion": Style(completion.ask, completion.FILES)}
