"""Engines hold one model, take new weights in place, and answer lm-eval's requests."""

from llmevo.engines.base import Engine
from llmevo.engines.hf import HfEngine
from llmevo.engines.vllm import VllmEngine

__all__ = ["Engine", "HfEngine", "VllmEngine"]
