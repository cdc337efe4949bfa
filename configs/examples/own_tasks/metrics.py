"""A metric of one's own: does the reply's Python literal equal the expected result?"""

import ast
from typing import Any


def equal_value(question: dict[str, Any], reply: str) -> float:
    """1 for a literal equal to the `result` of the question, 0 for any other reply. No reply is executed."""
    try:
        return float(ast.literal_eval(reply.strip()) == question["result"])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return 0.0
