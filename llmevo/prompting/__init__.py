"""What the LLM is asked, and how its answer is read: tables and JSON for chat models, a pattern for base models."""

from llmevo.prompting.question import Prompt, Question, Reading, SliceGeometry, Templates
from llmevo.prompting.styles import STYLES

__all__ = ["STYLES", "Prompt", "Question", "Reading", "SliceGeometry", "Templates"]
