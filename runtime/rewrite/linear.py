"""Products with a weight, in one spelling: ``aten.linear``.

GPT-2's ``Conv1D`` is ``addmm`` on rows, others write ``x @ w``; a backend prepacks one form.  The weight's transpose is
a view, not a copy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fusegen.runtime.derived import viewed
from fusegen.runtime.program import Node, Program, Ref
from fusegen.runtime.rewrite.graph import Names, rank, spec_of

LINEAR = "aten.linear.default"
RESHAPE = "aten.reshape.default"


def as_linear(program: Program) -> tuple[Program, int]:
    """``addmm``, ``mm`` and ``matmul`` with a two-dimensional weight on the right become ``linear``; also how many."""
    weights, names = dict(program.weights), Names.of(program)
    transposed: dict[str, str] = {}
    nodes, count = [], 0
    for node in program.nodes:
        parts = _product(program, node)
        if parts is not None:
            x, weight, bias = parts
            if weight not in transposed:
                transposed[weight] = names.fresh(f"{weight}.t")
                weights[transposed[weight]] = viewed(torch.t, program.weights[weight])
            args = {"input": x, "weight": Ref(transposed[weight]), "bias": bias}
            node, count = replace(node, op=LINEAR, args=args), count + 1
        nodes.append(node)
    return (replace(program, weights=weights).with_nodes(tuple(nodes)) if count else program), count


def _product(program: Program, node: Node) -> tuple[Any, str, Any] | None:
    """The input, the weight's name and the bias of a product with a weight."""
    if node.op == "aten.addmm.default":
        x, right, bias = (node.args[k] for k in ("mat1", "mat2", "self"))
        if node.args["beta"] != 1 or node.args["alpha"] != 1 or not _is_weight(program, right):
            return None
        spec = spec_of(program, bias.name)
        return (x, right.name, bias) if spec and spec.shape == program.weights[right.name].shape[1:] else None
    if node.op == "aten.mm.default":
        x, right = node.args["self"], node.args["mat2"]
    elif node.op == "aten.matmul.default":
        x, right = node.args["self"], node.args["other"]
    else:
        return None
    return (x, right.name, None) if _is_weight(program, right) and (rank(program, x) or 0) >= 2 else None


def _is_weight(program: Program, value: Any) -> bool:
    return isinstance(value, Ref) and value.name in program.weights and program.weights[value.name].dim() == 2


def without_row_views(program: Program) -> tuple[Program, int]:
    """``reshape(linear(reshape(x, rows)), leading dimensions of x)`` is ``linear(x)``; also how many."""
    made = {o: n for n in program.nodes for o in n.outputs}
    users = program.users()
    replaced: dict[str, Node] = {}
    for node in program.nodes:
        if node.op != LINEAR or node.outputs[0] in program.outputs:
            continue
        rows = made.get(node.args["input"].name)
        after = users.get(node.outputs[0], [])
        if rows is None or rows.op != RESHAPE or len(after) != 1 or after[0].op != RESHAPE:
            continue
        x, y = spec_of(program, rows.args["self"].name), spec_of(program, after[0].outputs[0])
        flat = spec_of(program, rows.outputs[0])
        if x is None or y is None or flat is None or x.shape[:-1] != y.shape[:-1] or x.shape[-1:] != flat.shape[-1:]:
            continue
        out = spec_of(program, node.outputs[0])
        if out is not None and out.shape[-1:] == y.shape[-1:]:
            replaced[after[0].name] = replace(after[0], op=LINEAR, args={**node.args, "input": rows.args["self"]})
    nodes = tuple(replaced.get(n.name, n) for n in program.nodes)
    return (program.with_nodes(nodes) if replaced else program), len(replaced)
