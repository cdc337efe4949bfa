"""Engines hold one model, take new weights in place, and answer lm-eval's requests.

`hf.HfEngine` and `vllm.VllmEngine` are imported from their own modules, where one is started: both take seconds.
"""

from llmevo.engines.base import Engine

__all__ = ["Engine"]
