"""A nearest 2x upsampling and the convolution after it as one op, where a kernel takes them.

It is done once the sizes, strides and device are known, not by a spelling: where no kernel of ours is faster, the two
nodes stay the library's.  The filters depend on the weight alone, so a session works them out once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op
from fusegen.runtime.program import Applied, Node, Program, Ref
from fusegen.runtime.rewrite.graph import Names, without_dead
from fusegen.runtime.specialize import propagate, spec_of

RULE = "upsampling and convolution are one"
_PLAIN = {
    "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1,
    "residual": None, "activation": "none", "multiplier": None,
}  # fmt: skip


def folded(program: Program, declined: Callable[[Op, tuple[Any, ...]], str | None]) -> Program:
    """The static ``program``, lowered and its strides known, with ``upsample2x_conv`` in the place of the two nodes
    where a kernel takes it.  ``declined(op, args)``: why none does, or None.
    """
    made = {o: n for n in program.nodes for o in n.outputs}
    users, names = program.users(), Names.of(program)
    nodes: list[Node] = []
    left: list[str] = []
    for node in program.nodes:
        before = made.get(node.args["input"].name) if node.op == "runtime.conv2d" else None
        if before is None or not _fits(node, before, program) or len(users[before.outputs[0]]) != 1:
            nodes.append(node)
            continue
        reason = _declined(node, before, program, declined)
        if reason is not None:
            left.append(f"{node.name}: {reason}")
            nodes.append(node)
            continue
        filters = names.fresh(f"{node.args['weight'].name}.phases")
        nodes.append(Node(filters, "fusegen.upsample2x_filters.default", {"weight": node.args["weight"]}, (filters,)))
        args = {"x": before.args["input"], "filters": Ref(filters), "bias": node.args["bias"]}
        nodes.append(replace(node, op="fusegen.upsample2x_conv.default", args=args))
    count = (len(nodes) - len(program.nodes)) if nodes else 0
    if count or left:
        program = replace(program, applied=(*program.applied, Applied(RULE, count, tuple(left))))
    return propagate(without_dead(replace(program, nodes=tuple(nodes)))[0]) if count else program


def _fits(conv: Node, before: Node, program: Program) -> bool:
    """Whether ``conv`` is a plain 3x3 convolution by a weight of the program, and ``before`` doubles both sides."""
    weight = conv.args["weight"]
    if before.op != "aten.upsample_nearest2d.vec" or before.outputs[0] in program.outputs:
        return False
    small, large = (spec_of(program, name).sizes for name in (before.args["input"].name, before.outputs[0]))
    return (
        large[2:] == (2 * small[2], 2 * small[3])
        and before.args["scale_factors"] in (None, (2.0, 2.0))
        and isinstance(weight, Ref)
        and weight.name in program.weights
        and tuple(program.weights[weight.name].shape[2:]) == (3, 3)
        and all(conv.args[k] == v for k, v in _PLAIN.items())
    )


def _declined(conv: Node, before: Node, program: Program, declined: Callable[..., str | None]) -> str | None:
    given = (before.args["input"], conv.args["weight"], conv.args["bias"])
    x, weight, bias = (None if v is None else spec_of(program, v.name).meta() for v in given)
    assert x is not None and weight is not None
    (filters,) = registry.get("upsample2x_filters").allocate(weight)
    if x.dtype != weight.dtype:
        return f"x is {x.dtype} and the weight {weight.dtype}"
    return declined(registry.get("upsample2x_conv"), (x, filters, bias))
