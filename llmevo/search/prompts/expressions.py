"""Expressions of depth, such as `0.3 + 0.5*depth`: the values of a column over the layers.

A text is parsed into a syntax tree of few kinds of nodes, and computed by walking through it. It is never executed.
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

OPERATORS: Mapping[type[ast.AST], Callable[[float, float], Any]] = {
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
}
FUNCTIONS: Mapping[str, tuple[int, int]] = {
    "min": (2, 9),
    "max": (2, 9),
    "abs": (1, 1),
    "exp": (1, 1),
    "clip": (3, 3),
    "bump": (2, 2),
}
"""The least and most arguments. `clip(x, low, high)`; `bump(centre, width)` is exp(-((depth - centre) / width)²)."""
VARIABLES = ("depth", "row")
SIGNS = str.maketrans({"^": "**", "−": "-", "×": "*", "·": "*"})


class Expression:
    """A function of `depth`, 0 at the first layer and 1 at the last, and of `row`, the number of a row of the table.

    Numbers, + - * / **, comparisons, `a if b else c`, and the functions of `FUNCTIONS`.
    """

    def __init__(self, text: str) -> None:
        """Raise ValueError for a text that is no such expression."""
        if len(text) > LONGEST:
            raise ValueError(f"an expression has at most {LONGEST} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the parser, such as for `1if depth else 2`
                self._tree = ast.parse(text.lower().translate(SIGNS).strip(), mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            raise ValueError(f"{text[:40]!r} is no expression") from None
        _check(self._tree, DEEPEST)

    def value(self, depth: float, row: float) -> float:
        """Return the value of a row. Raise ValueError where it is no finite number."""
        try:
            return _value(self._tree, {"depth": depth, "row": row})
        except (ArithmeticError, ValueError) as error:
            raise ValueError(f"the expression has no value at depth {depth:.2f}: {error}") from None


def _check(node: ast.AST, depth: int) -> None:
    """Raise ValueError for a node that is not allowed."""
    inner: list[ast.expr] = []
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool) and abs(value) < 1e300:
            pass
        case ast.Name(id=name) if name in VARIABLES:
            pass
        case ast.Name(id=name):
            raise ValueError(f"{name[:40]!r} is unknown; known: {', '.join((*VARIABLES, *FUNCTIONS))}")
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not(), operand=operand):
            inner = [operand]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            inner = [left, right]
        case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in OPERATORS for op in ops):
            inner = [left, *others]
        case ast.BoolOp(values=values):
            inner = values
        case ast.IfExp(test=test, body=body, orelse=other):
            inner = [test, body, other]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            least, most = FUNCTIONS[name]
            if not least <= len(args) <= most:
                raise ValueError(f"{name} has {len(args)} arguments")
            inner = args
        case _:
            kind = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(node).__name__).lower()
            raise ValueError(f"a {kind} is not allowed in an expression")
    if inner and not depth:
        raise ValueError("the expression is nested too deep")
    for part in inner:
        _check(part, depth - 1)


def _value(node: ast.AST, variables: Mapping[str, float]) -> float:
    """The value of a checked node. Raise ArithmeticError or ValueError where there is none."""

    def of(part: ast.AST) -> float:
        return _value(part, variables)

    found: Any = math.nan
    match node:
        case ast.Constant(value=int() | float() as value):
            found = value
        case ast.Name(id=name):
            found = variables[name]
        case ast.UnaryOp(op=op, operand=operand):
            found = (
                -of(operand)
                if isinstance(op, ast.USub)
                else not of(operand)
                if isinstance(op, ast.Not)
                else of(operand)
            )
        case ast.BinOp(left=left, op=op, right=right):
            first, second = of(left), of(right)
            if isinstance(op, ast.Pow) and abs(second) > EXPONENT:
                raise ValueError(f"an exponent is at most {EXPONENT:g}")
            found = OPERATORS[type(op)](first, second)
        case ast.Compare(left=left, ops=ops, comparators=others):
            values = [of(left), *map(of, others)]
            found = all(OPERATORS[type(op)](*pair) for op, *pair in zip(ops, values, values[1:], strict=False))
        case ast.BoolOp(op=op, values=parts):
            found = (all if isinstance(op, ast.And) else any)([of(part) != 0 for part in parts])
        case ast.IfExp(test=test, body=body, orelse=other):
            found = of(body) if of(test) else of(other)
        case ast.Call(func=ast.Name(id=name), args=args):
            found = _call(name, [*map(of, args)], variables["depth"])
        case _:
            pass
    if isinstance(found, complex) or not math.isfinite(found):
        raise ValueError("it is not finite" if not isinstance(found, complex) else "a root of a negative number")
    return float(found)


def _call(name: str, values: list[float], depth: float) -> float:
    match name:
        case "min":
            return min(values)
        case "max":
            return max(values)
        case "abs":
            return abs(values[0])
        case "exp":
            return math.exp(values[0])
        case "clip":
            return min(max(values[0], values[1]), values[2])
        case _:
            return math.exp(-(((depth - values[0]) / values[1]) ** 2))
