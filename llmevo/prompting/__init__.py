"""What the LLM is asked, and how its answer is read: tables and JSON for chat models, a pattern for base models."""

from llmevo.prompting.question import Prompt, Question, Reading, SliceGeometry
from llmevo.prompting.styles import STYLES
from llmevo.prompting.templates import Templates

__all__ = ["STYLES", "Prompt", "Question", "Reading", "SliceGeometry", "Templates"]
