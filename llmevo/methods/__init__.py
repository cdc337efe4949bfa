"""The merge methods: `METHODS` is the registry, one method a file.

To add one: a file with a `Method`, and its line here. The contract tests pick it up by themselves.
"""

from llmevo.methods.base import Method, Parameter
from llmevo.methods.dare_ties import DARE_TIES
from llmevo.methods.linear import LINEAR
from llmevo.methods.slerp import SLERP
from llmevo.methods.task_arithmetic import TASK_ARITHMETIC
from llmevo.methods.ties import TIES

METHODS: dict[str, Method] = {method.name: method for method in (LINEAR, TASK_ARITHMETIC, SLERP, TIES, DARE_TIES)}
"""Every merge method by its name in mergekit's YAML."""

__all__ = ["METHODS", "Method", "Parameter"]
