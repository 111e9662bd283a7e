"""Attention that a quantized program has in int8, back in the compute dtype where the plan finds no kernel for it.

The products of int8 pay only where the CPU has instructions for them, at some levels for many queries alone; attention
in the compute dtype is the more exact form, and the one that other devices have kernels for.  As in :mod:`.upsample`,
this is done once sizes and strides are known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op
from fusegen.runtime.program import Applied, Node, Program, Ref
from fusegen.runtime.specialize import propagate, spec_of

OP, PLAIN = "fusegen.attention_int8.default", "fusegen.attention.default"
RULE = "attention in int8"


def settled(
    program: Program,
    declined: Callable[[Op, tuple[Any, ...]], str | None],
    unserved: Callable[[Tensor, Tensor], str | None],
) -> Program:
    """The static ``program``, lowered and its strides known, with ``attention`` in the place of each ``attention_int8``
    that no kernel takes.  ``declined(op, args)``: why none does, or None; ``unserved(q, k)``: why the backend does not
    let one, tensors on ``meta``.
    """
    found = [n for n in program.nodes if n.op == OP]
    if not found:
        return program
    metas = {n.name: _metas(n, program) for n in found}
    op = registry.get("attention_int8")
    why = {name: unserved(*args[:2]) or declined(op, args) for name, args in metas.items()}
    nodes = tuple(_plain(n) if why.get(n.name) is not None else n for n in program.nodes)
    left = tuple(f"{name}: {stays}" for name, stays in why.items() if stays is not None)
    applied = Applied(RULE, len(found) - len(left), left)
    program = replace(program, applied=(*program.applied, applied))
    return propagate(program.with_nodes(nodes)) if left else program


def _metas(node: Node, program: Program) -> tuple[Any, ...]:
    """The node's arguments, tensors on ``meta``."""
    return tuple(spec_of(program, v.name).meta() if isinstance(v, Ref) else v for v in node.args.values())


def _plain(node: Node) -> Node:
    q, k, v, scale = (node.args[name] for name in ("q", "k", "v", "scale"))
    given = {"q": q, "k": k, "v": v, "mask": None, "key_lengths": None, "causal": False, "scale": scale}
    return replace(node, op=PLAIN, args=given)
