"""Arithmetic on symbolic sizes.

A dimension of a :class:`~fusegen.runtime.program.TensorSpec` is an integer, a symbol's name, or an integer expression
of symbols such as ``"2*s0"`` or ``"(s0 + 1)//2"``: Python's ``+ - * // % **``, comparisons, ``and``, ``or``, and the
functions ``max`` and ``min``.  Expressions are parsed and walked here, never given to ``eval``.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fusegen.runtime.errors import GraphError

MAX_TEXT = 4096  # characters: a real size needs a few dozen, and parsing is linear in it
MAX_SIZE = 2**63 - 1  # the largest size there is, and the upper bound of a symbol that has none

_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ALL: dict[type[ast.AST], Callable[[Iterable[int]], bool]] = {ast.And: all, ast.Or: any}
_FUNCTIONS: dict[str, Callable[..., int]] = {"max": max, "min": min}


def parse(text: str) -> ast.expr:
    """The syntax tree of an expression; :class:`GraphError` where it is not one."""
    try:
        if len(text) > MAX_TEXT:
            raise ValueError
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise GraphError("a size is not an expression that can be read", where=text[:80]) from None


def evaluate(size: int | str, values: Mapping[str, int]) -> int:
    """The value of a dimension where ``values`` gives each symbol's; comparisons give 0 or 1."""
    if isinstance(size, int):
        return size
    if size in values:
        return values[size]
    try:
        return int(_value(parse(size), values))
    except (KeyError, ZeroDivisionError, TypeError, OverflowError, RecursionError) as error:
        raise GraphError(f"the size {size!r} has no value", where=f"{type(error).__name__}: {error}") from None


@functools.lru_cache(maxsize=4096)
def symbols_of(size: int | str) -> frozenset[str]:
    """The symbols a dimension is made of."""
    if isinstance(size, int):
        return frozenset()
    names = {n.id for n in ast.walk(parse(size)) if isinstance(n, ast.Name)}
    return frozenset(names - _FUNCTIONS.keys())


def _value(node: ast.expr, values: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int() as number):
            return number
        case ast.Name(id=name):
            return values[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, values)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int() as power)) if 0 <= power <= 16:
            return int(_value(left, values) ** power)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return int(_BINARY[type(op)](_value(left, values), _value(right, values)))
        case ast.BoolOp(op=op, values=parts):
            return int(_ALL[type(op)](_value(p, values) for p in parts))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
            return int(_COMPARE[type(op)](_value(left, values), _value(right, values)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS and args:
            return _FUNCTIONS[name](*(_value(a, values) for a in args))
    raise GraphError("a size uses what is not integer arithmetic", where=ast.unparse(node)[:80])


def from_guard(text: str, sizes: Mapping[str, tuple[int | str, ...]]) -> str | None:
    """A guard that torch.export wrote about its inputs' ``sizes``, as an expression of symbols.

    ``"L['x'].size()[2] % 8 == 0"`` becomes ``"height % 8 == 0"``.  None where it always holds, or speaks of anything
    but sizes.
    """
    try:
        tree = _Sizes(sizes).visit(parse(text))
        if isinstance(tree, ast.Compare) and ast.dump(tree.left) == ast.dump(tree.comparators[0]):
            return None
        guard = ast.unparse(tree)
        evaluate(guard, dict.fromkeys(symbols_of(guard), 2**20))  # is it arithmetic throughout?
    except (GraphError, KeyError, IndexError, TypeError, RecursionError):
        return None
    return guard if symbols_of(guard) else None


class _Sizes(ast.NodeTransformer):
    """Replaces ``L['x'].size()[i]`` by the dimension it names; nested inputs are named by their path, joined by _."""

    def __init__(self, sizes: Mapping[str, tuple[int | str, ...]]):
        self.sizes = sizes

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        match node:
            case ast.Subscript(ast.Call(ast.Attribute(value, "size"), [], []), ast.Constant(int() as index)):
                return parse(str(self.sizes["_".join(self._path(value))][index]))
        raise KeyError(ast.unparse(node))

    def _path(self, node: ast.expr) -> list[str]:
        match node:
            case ast.Name("L"):
                return []
            case ast.Subscript(inner, ast.Constant(key)):
                return [*self._path(inner), str(key)]
        raise KeyError(ast.unparse(node))


# sympy's spelling of an expression (``srepr``), as torch.export writes it -> ours.
_JOIN = {"Add": " + ", "Mul": "*"}
_INFIX = {"FloorDiv": "//", "CleanDiv": "//", "Mod": "%", "PythonMod": "%"}
_RELATION = {
    "Equality": "==",
    "Unequality": "!=",
    "StrictLessThan": "<",
    "LessThan": "<=",
    "StrictGreaterThan": ">",
    "GreaterThan": ">=",
}
_WORDS = {"Max": "max", "Min": "min"}


@functools.lru_cache(maxsize=4096)
def from_sympy(text: str) -> str | None:
    """An expression that torch.export wrote, in our spelling; None where it is more than integer arithmetic."""
    try:
        return _translate(parse(text), outermost=True)
    except (GraphError, RecursionError):
        return None


def _translate(node: ast.expr, outermost: bool = False) -> str | None:
    match node:
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str() as name)]):
            return name if name.isidentifier() and name not in _FUNCTIONS else None
        case ast.Call(func=ast.Name(id="Integer"), args=[ast.UnaryOp() | ast.Constant() as number]):
            return ast.unparse(number)
        case ast.Call(func=ast.Name(id="Identity"), args=[argument]):
            return _translate(argument, outermost)
        case ast.Call(func=ast.Name(id="Pow"), args=[base, ast.Call(args=[ast.Constant(value=int() as power)])]):
            inner = _translate(base)
            return None if inner is None or power < 0 else f"{inner}**{power}"
        case ast.Call(func=ast.Name(id=name), args=args):
            parts = [_translate(a) for a in args]
            if any(p is None for p in parts):
                return None
            known = [p for p in parts if p is not None]
            return _compose(name, known, outermost)
    return None


def _compose(name: str, parts: list[str], outermost: bool) -> str | None:
    if name in _WORDS:
        return f"{_WORDS[name]}({', '.join(parts)})"
    if name in _JOIN:
        text = _JOIN[name].join(parts)
    elif name == "CeilDiv" and len(parts) == 2:
        text = f"({parts[0]} + {parts[1]} - 1)//{parts[1]}"
    elif name in _INFIX and len(parts) == 2:
        text = f"{parts[0]}{_INFIX[name]}{parts[1]}"
    elif name in _RELATION and len(parts) == 2:
        text = f"{parts[0]} {_RELATION[name]} {parts[1]}"
    else:
        return None
    return text if outermost else f"({text})"
