"""Takes the gate of a feed-forward layer apart again where a product's epilogue can hold it.

``fusegen.gated_mlp_act`` reads two values back and writes one.  Where both come from products of their own, the
activation and the multiplication cost nothing inside the products: then separate nodes serve better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fusegen.runtime.derived import Weight, viewed
from fusegen.runtime.program import Node, Program, Ref, TensorSpec
from fusegen.runtime.read.operators import complete
from fusegen.runtime.rewrite.graph import Names, overload, without_dead

GATED = "fusegen.gated_mlp_act.default"
PRODUCTS = ("aten.linear.default", "aten.conv2d.default")
ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "silu": ("aten.silu.default", {}),
    "relu": ("aten.relu.default", {}),
    "gelu": ("aten.gelu.default", {"approximate": "none"}),
    "gelu_tanh": ("aten.gelu.default", {"approximate": "tanh"}),
}


def opened(program: Program) -> tuple[Program, int]:
    """Each gate that stands behind products which nothing else uses becomes an activation and a multiplication.

    Gate and up in two halves of one linear become two linears, on the halves of the weight (views, not copies).  Also
    how many gates were opened.
    """
    made = {o: n for n in program.nodes for o in n.outputs}
    opening = _Opening(program, dict(program.weights), dict(program.specs), Names.of(program))
    nodes: list[Node] = []
    count = 0
    for node in program.nodes:
        sources = _sources(program, node, made) if node.op == GATED else None
        if sources is None:
            nodes.append(node)
            continue
        count += 1
        halves = opening.halves(node, sources[0]) if node.args["up"] is None else []
        gate, up = [n.outputs[0] for n in halves] or [node.args["x"].name, node.args["up"].name]
        nodes += [*halves, *opening.gate(node, gate, up)]
    if not count:
        return program, 0
    out = replace(program, weights=opening.weights, specs=opening.specs).with_nodes(tuple(nodes))
    return without_dead(out)[0], count


def _sources(program: Program, node: Node, made: Mapping[str, Node]) -> list[Node] | None:
    """The products behind a gate, where it alone uses each and its activation is one that they can hold."""
    if node.args["activation"] not in ACTIVATIONS:
        return None
    names = [node.args[k].name for k in ("x", "up") if node.args[k] is not None]
    users, found = program.users(), [made.get(name) for name in names]
    sources = [s for s in found if s is not None and s.op in PRODUCTS]
    alone = all(users[name] == [node] and name not in program.outputs for name in names)
    if len(sources) < len(names) or not alone or len(set(names)) < len(names):
        return None
    if len(names) == 1:  # only a weight that is there can be cut in two
        parts = [sources[0].args[k] for k in ("weight", "bias")]
        if sources[0].op != PRODUCTS[0] or any(p is not None and p.name not in program.weights for p in parts):
            return None
    return sources


def _half(weight: Weight, half: int) -> Weight:
    return viewed(lambda w: w.chunk(2)[half], weight)


class _Opening:
    """The new nodes, and the weights and specs they need."""

    def __init__(self, program: Program, weights: dict[str, Weight], specs: dict[str, TensorSpec], names: Names):
        self.program, self.weights, self.specs, self.names = program, weights, specs, names

    def _value(self, node: Node, base: str) -> str:
        """A new value of the shape and dtype of ``node``'s output."""
        name, spec = self.names.fresh(f"{node.name}.{base}"), self.program.specs[node.outputs[0]]
        self.specs[name] = TensorSpec(spec.shape, spec.dtype)
        return name

    def halves(self, node: Node, source: Node) -> list[Node]:
        """The linear of the gate and that of the up projection."""
        order = (0, 1) if node.args["gate_first"] else (1, 0)
        out = []
        for half, base in zip(order, ("gate", "up"), strict=True):
            args: dict[str, Any] = {"input": source.args["input"], "weight": None, "bias": None}
            for k in ("weight", "bias"):
                if source.args[k] is not None:
                    old = source.args[k].name
                    new = self.names.fresh(f"{old}.half{half}")
                    self.weights[new], args[k] = _half(self.program.weights[old], half), Ref(new)
            name = self._value(node, base)
            out.append(replace(source, name=name, args=args, outputs=(name,)))
        return out

    def gate(self, node: Node, gate: str, up: str) -> list[Node]:
        """The activation of ``gate``, and its product with ``up``."""
        op, more = ACTIVATIONS[node.args["activation"]]
        name = self._value(node, "activated")
        act = Node(name, op, complete(overload(op), {"self": Ref(gate), **more}, name), (name,), node.source)
        product = complete(overload("aten.mul.Tensor"), {"self": Ref(up), "other": Ref(name)}, node.name)
        return [act, replace(node, op="aten.mul.Tensor", args=product)]
