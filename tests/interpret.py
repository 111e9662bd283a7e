"""Runs a Program node by node with PyTorch's own operators: the meaning that readers are tested against."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusegen.runtime.derived import values
from fusegen.runtime.program import Program, substitute
from fusegen.runtime.rewrite.epilogue import EAGER

_SYM = {
    "sym.not": operator.not_,
    "sym.trunc": math.trunc,
    "sym.int": int,
    "sym.float": float,
    "sym.max": max,
    "sym.min": min,
    "sym.sqrt": math.sqrt,
    "sym.ite": lambda b, t, f: t if b else f,
}


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _call(op: str, args: dict[str, Any]) -> Any:
    namespace, base, *overload = op.split(".")
    if namespace == "runtime":
        return EAGER[op](**args)
    if namespace == "sym":
        return _SYM.get(op, getattr(operator, base, None))(*args.values())
    return getattr(getattr(getattr(torch.ops, namespace), base), overload[0])(**args)


def interpret(program: Program, *inputs: Tensor) -> tuple[Any, ...]:
    """The program's outputs."""
    table: dict[str, Any] = {**values(program.weights), **dict(zip(program.inputs, inputs, strict=True))}
    with torch.no_grad():
        for node in program.nodes:
            args = {k: substitute(v, table) for k, v in node.args.items()}
            table.update(zip(node.outputs, _flat(_call(node.op, args)), strict=True))
    return tuple(table[name] for name in program.outputs)
