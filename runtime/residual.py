"""A residual addition that reads a linear layer through views, done in the product.

The spatial transformers of diffusion models end so: rows of pixels from a linear layer are viewed as an image, and the
block's input is added.  Where the other operand lies in memory as the viewed rows do, which only strides tell, it is
viewed as rows too, and the addition is an epilogue of the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fusegen.runtime.program import Applied, Node, Program, Ref
from fusegen.runtime.rewrite.graph import Names
from fusegen.runtime.specialize import Strided, propagate, spec_of

RULE = "residual in the product, through views"
_VIEW = "aten.as_strided.default"
_INT8 = "fusegen.linear_int8.default"


def through_views(program: Program) -> Program:
    """The static ``program``, lowered and its strides known, with each such addition in the linear layer before it."""
    made = {o: n for n in program.nodes for o in n.outputs}
    users, names = program.users(), Names.of(program)
    nodes: dict[str, tuple[Node, ...]] = {}
    gone: set[str] = set()
    for node in program.nodes:
        nodes[node.name] = (node,)
        if node.op != "aten.add.Tensor" or node.args["alpha"] != 1:
            continue
        operands = node.args["self"], node.args["other"]
        if not all(isinstance(o, Ref) for o in operands) or operands[0] == operands[1]:
            continue
        for mine, other in (operands[::-1], operands):
            chain = _chain(mine.name, made, users, program)
            if chain and gone.isdisjoint(n.name for n in chain) and _alike(mine.name, other.name, program):
                nodes[node.name] = _fused(node, chain, other, program, names)
                gone.update(n.name for n in chain)
                break
    if not gone:
        return program
    kept = tuple(n for name, several in nodes.items() if name not in gone for n in several)
    count = sum(len(several) > 1 for name, several in nodes.items())
    return propagate(replace(program, nodes=kept, applied=(*program.applied, Applied(RULE, count))))


def _chain(
    name: str, made: Mapping[str, Node], users: Mapping[str, list[Node]], program: Program
) -> tuple[Node, ...] | None:
    """The plain linear layer behind ``name`` and the views of it that lead there, none of them used elsewhere."""
    found: list[Node] = []
    while name in made and len(users[name]) == 1 and name not in program.outputs:
        node, spec = made[name], spec_of(program, name)
        found.append(node)
        if node.op == "aten.linear.default" or (node.op == _INT8 and node.args["residual"] is None):
            return tuple(found[::-1]) if len(found) > 1 else None
        if spec.alias is None or len(node.outputs) != 1 or set(node.inputs()) != {spec.alias}:
            return None
        name = spec.alias
    return None


def _alike(mine: str, other: str, program: Program) -> bool:
    """Whether both have the same elements in the same places of their memory, with no gaps."""
    one, two = spec_of(program, mine), spec_of(program, other)
    return one.dense() == two.dense() and _full(one)


def _full(spec: Strided) -> bool:
    reach = 1 + sum((size - 1) * stride for size, stride in zip(spec.sizes, spec.strides, strict=True))
    return spec.nbytes > 0 and reach * spec.dtype.itemsize == spec.nbytes


def _fused(node: Node, chain: tuple[Node, ...], other: Ref, program: Program, names: Names) -> tuple[Node, ...]:
    """The other operand as rows, the product with it, and the views of the product; the last gives the sum's name."""
    linear = chain[0]
    rows = spec_of(program, linear.outputs[0])
    view, product = names.fresh(f"{node.name}.rows"), names.fresh(f"{node.name}.product")
    given = {"self": other, "size": rows.sizes, "stride": rows.strides, "storage_offset": None}
    own = linear.op == _INT8
    plain = {} if own else {"activation": "none", "multiplier": None}
    args = {**linear.args, "residual": Ref(view), **plain}
    op = linear.op if own else "runtime.linear"
    out = [Node(view, _VIEW, given, (view,)), replace(linear, name=product, op=op, args=args, outputs=(product,))]
    before = linear.outputs[0]
    for step in chain[1:]:
        name = names.fresh(f"{node.name}.view")
        args = {k: Ref(out[-1].outputs[0]) if v == Ref(before) else v for k, v in step.args.items()}
        out.append(replace(step, name=name, args=args, outputs=(name,)))
        before = step.outputs[0]
    return (*out[:-1], replace(out[-1], name=node.name, outputs=node.outputs))
