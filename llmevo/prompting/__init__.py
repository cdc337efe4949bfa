"""What the LLM is asked, and how its answer is read: chat models get tables and a JSON schema, base models a pattern."""

from llmevo.prompting.question import Prompt, Question, Reading, Templates
from llmevo.prompting.styles import STYLES

__all__ = ["STYLES", "Prompt", "Question", "Reading", "Templates"]
