"""Engines hold one model, take new weights in place, and answer lm-eval's requests."""

from llmevo.engines.base import Engine
from llmevo.engines.hf import HfEngine

__all__ = ["Engine", "HfEngine"]
