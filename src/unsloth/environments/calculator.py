"""A calculator as a tool."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

_MOST_CHARACTERS = 200
_LARGEST = 10.0**100
_TWO: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def calculate(expression: str) -> str:
    """Work out an arithmetic expression.

    Args:
        expression: Numbers, parentheses and + - * / // % **, such as "(3 + 4) * 12".

    Returns:
        The result.
    """
    if not isinstance(expression, str) or len(expression) > _MOST_CHARACTERS:
        raise ValueError(f"the expression must be a text of at most {_MOST_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"{expression!r} is not an arithmetic expression") from None
    value = _value(tree.body)
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _TWO:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(left) > 1 and abs(right) > 400:
            raise ValueError("the result is too large")
        try:
            return _bounded(_TWO[type(node.op)](left, right))
        except ZeroDivisionError:
            raise ValueError("division by zero") from None
        except OverflowError:
            raise ValueError("the result is too large") from None
    raise ValueError("only numbers, parentheses and + - * / // % ** are allowed")


def _bounded(value: Any) -> Any:
    if isinstance(value, complex) or not math.isfinite(value) or abs(value) > _LARGEST:
        raise ValueError("the result is too large, or no real number")
    return value
