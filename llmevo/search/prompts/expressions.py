"""Expressions of depth, such as `0.3 + 0.5*depth`: the values of a column over the layers.

A text is parsed into a syntax tree and computed by walking through the few kinds of nodes that are known here. It is
never executed.
"""

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

LONGEST = 200  # characters
DEEPEST = 30  # nested operations
EXPONENT = 8.0  # the largest

OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Not: operator.not_,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "abs": abs,
    "exp": math.exp,
    "clip": lambda x, low, high: min(max(x, low), high),
    "bump": lambda offset, width: math.exp(-((offset / width) ** 2)),  # offset: depth - centre
}
SIGNS = str.maketrans({"^": "**", "−": "-", "×": "*", "·": "*"})


class Expression:
    """A function of `depth`, 0 at the first layer and 1 at the last, and of `row`, the number of a row of the table.

    Numbers, + - * / **, comparisons, and, or, not, `a if b else c`, min, max, abs, exp, `clip(x, low, high)` and
    `bump(centre, width)`, which is exp(-((depth - centre) / width)²).
    """

    def __init__(self, text: str) -> None:
        """Raise ValueError for a text that is no expression."""
        if len(text) > LONGEST:
            raise ValueError(f"an expression has at most {LONGEST} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the parser, such as for `1if depth else 2`
                self._tree = ast.parse(text.lower().translate(SIGNS).strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise ValueError(f"{text[:40]!r} is no expression") from None

    def value(self, depth: float, row: float) -> float:
        """Return the value of a row. Raise ValueError for an unknown name or operation, and for no finite number."""
        try:
            return _value(self._tree, {"depth": depth, "row": row}, DEEPEST)
        except (ArithmeticError, TypeError) as error:  # also for a wrong number of arguments
            raise ValueError(f"the expression has no value at depth {depth:.2f}: {error}") from None


def _value(node: ast.AST, variables: Mapping[str, float], left: int) -> float:
    """The value of a node, with so many more below it allowed."""
    if not left:
        raise ValueError("the expression is nested too deep")

    def of(part: ast.AST) -> float:
        return _value(part, variables, left - 1)

    match node:
        case ast.Constant(value=int() | float() as value):  # no bool: the text is in lower case
            found = value
        case ast.Name(id=name) if name in variables:
            found = variables[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            found = OPERATORS[type(op)](of(operand))
        case ast.BinOp(left=first, op=op, right=second) if type(op) in OPERATORS:
            values = of(first), of(second)
            if isinstance(op, ast.Pow) and abs(values[1]) > EXPONENT:
                raise ValueError(f"an exponent is at most {EXPONENT:g}")
            found = OPERATORS[type(op)](*values)
        case ast.Compare(left=first, ops=ops, comparators=others) if all(type(op) in OPERATORS for op in ops):
            values = [of(first), *map(of, others)]
            found = all(OPERATORS[type(op)](*pair) for op, *pair in zip(ops, values, values[1:], strict=False))
        case ast.BoolOp(op=op, values=parts):
            found = (all if isinstance(op, ast.And) else any)([of(part) for part in parts])
        case ast.IfExp(test=test, body=body, orelse=other):
            found = of(body if of(test) else other)
        case ast.Call(func=ast.Name(id=name), args=[centre, width], keywords=[]) if name == "bump":
            found = FUNCTIONS[name](variables["depth"] - of(centre), of(width))
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in FUNCTIONS:
            found = FUNCTIONS[name](*map(of, parts))
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)):
            raise ValueError(f"{name[:40]!r} is unknown; known: {', '.join((*variables, *FUNCTIONS))}")
        case _:
            kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(node).__name__).lower()
            raise ValueError(f"{kind} is not allowed in an expression")
    if isinstance(found, complex) or not math.isfinite(found):
        raise ValueError("the expression has no finite value")
    return float(found)
