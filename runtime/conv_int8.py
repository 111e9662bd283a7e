"""Convolutions that a quantized program has in int8, in the compute dtype where the backend has no such products.

Without them int8 is slower than what it was made from: the codes of the weights are turned back into numbers when they
are packed, and the convolution is a plain one.  What is read is then not rounded, so this is the more exact form.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fusegen.runtime.derived import Derived, converted
from fusegen.runtime.program import Applied, Node, Program, Ref
from fusegen.runtime.read.operators import complete
from fusegen.runtime.rewrite.graph import Names, overload
from fusegen.runtime.specialize import propagate, spec_of

OP, PLAIN = "fusegen.conv2d_int8.default", "aten.conv2d.default"
RULE = "convolutions in int8"


def settled(program: Program, reason: str | None) -> Program:
    """The static ``program``, not lowered yet, with a plain convolution in the place of each ``conv2d_int8``.

    ``reason``: why the backend has no products for these, or None where it has.
    """
    found = [n for n in program.nodes if n.op == OP and _alone(n, program)]
    if reason is None or not found:
        return program
    names, weights, made = Names.of(program), dict(program.weights), dict[tuple[str, torch.dtype], Ref]()
    nodes = {}
    for node in found:
        codes, scale, x = (node.args[k].name for k in ("weight", "scale", "x"))
        key = codes, spec_of(program, x).dtype
        if key not in made:
            made[key] = Ref(names.fresh(f"{codes}.restored"))
            weights[made[key].name] = Derived(partial(_restored, dtype=key[1]), weights[codes], weights[scale])
        bias = node.args["bias"]
        if bias is not None and spec_of(program, bias.name).dtype != key[1]:
            bias = Ref(names.fresh(f"{bias.name}.converted"))
            weights[bias.name] = converted(weights[node.args["bias"].name], key[1])
        given = {"input": node.args["x"], "weight": made[key], "bias": bias}
        given |= {k: node.args[k] for k in ("stride", "padding", "dilation")}
        nodes[node.name] = replace(node, op=PLAIN, args=complete(overload(PLAIN), given, node.name))
    applied = Applied(RULE, 0, tuple(f"{name}: {reason}" for name in nodes))
    program = replace(program, weights=weights, applied=(*program.applied, applied))
    return propagate(program.with_nodes(tuple(nodes.get(n.name, n) for n in program.nodes)))


def _alone(node: Node, program: Program) -> bool:
    """Whether the node is as quantizing made it: of weights of the program, with nothing behind it."""
    given = (node.args[k] for k in ("weight", "scale", "bias"))
    constant = all(ref is None or ref.name in program.weights for ref in given)
    return constant and node.args["residual"] is None and node.args["activation"] == "none"


def _restored(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes and a scale for each output as numbers."""
    return (codes.float() * scale[:, None, None, None]).to(dtype)
