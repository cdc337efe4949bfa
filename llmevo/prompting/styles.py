"""The ways to put a question; a proposer names the one that suits its model."""

from collections.abc import Callable
from dataclasses import dataclass

from llmevo.prompting import chat, completion
from llmevo.prompting.question import Prompt, Question
from llmevo.prompting.templates import Templates


@dataclass(frozen=True)
class Style:
    """A wording and its template files."""

    ask: Callable[[Question, Templates, int], Prompt]
    files: tuple[str, ...]


STYLES = {"chat": Style(chat.ask, chat.FILES), "completion": Style(completion.ask, completion.FILES)}
"""The styles by name."""
