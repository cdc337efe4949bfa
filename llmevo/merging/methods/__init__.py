"""The merge methods: `METHODS` is the registry.

To add one: a file with its function, and its entry in `registry`. The contract tests pick it up by themselves.
"""

from llmevo.merging.methods.registry import METHODS, Method, Parameter

__all__ = ["METHODS", "Method", "Parameter"]
