"""Biases of convolutions moved to what adds them without a launch of its own, in a static program.

Where a library's convolution takes no bias, each is one more pass over the result.  Three readers add it for nothing:
a group norm, as a value of each channel; one that adds the time embedding already, as part of that embedding's linear
layer; and another convolution whose result is added to this one's, of single pixels if there is the choice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from fusegen.runtime.derived import Derived, Moved, Weight
from fusegen.runtime.program import Applied, Node, Program, Ref
from fusegen.runtime.rewrite.graph import Names, spec_of

RULE = "bias moved to its reader"
_CONV, _LINEAR, _NORM = "aten.conv2d.default", "aten.linear.default", "fusegen.group_norm.default"


def moved(program: Program) -> Program:
    """The static ``program`` with the biases of convolutions where their one reader adds them."""
    mover = _Mover(program)
    for node in program.nodes:
        if node.op == _CONV and mover.constant(node):
            mover.visit(mover.nodes[node.name])
    if not mover.count:
        return program
    applied = (*program.applied, Applied(RULE, mover.count))
    nodes = tuple(mover.nodes[n.name] for n in program.nodes)
    return replace(program.with_nodes(nodes), weights=mover.weights, applied=applied)


class _Mover:
    def __init__(self, program: Program):
        self.program, self.users, self.names = program, program.users(), Names.of(program)
        self.made = {o: n.name for n in program.nodes for o in n.outputs}
        self.nodes: dict[str, Node] = {n.name: n for n in program.nodes}
        self.weights: dict[str, Weight] = dict(program.weights)
        self.count = 0

    def constant(self, node: Node) -> bool:
        """Whether the node has a bias now, which like its weight is the program's own."""
        given = self.nodes[node.name].args["bias"], node.args["weight"]
        return all(isinstance(g, Ref) and g.name in self.weights for g in given)

    def visit(self, conv: Node) -> None:
        """Move the bias of ``conv``, where something takes it."""
        reader, bias = self._reader(conv.outputs[0]), conv.args["bias"].name
        if reader is None:
            return
        if reader.op == _NORM and reader.args["x"] == Ref(conv.outputs[0]) and reader.args["moments"] is None:
            taken = self._by_norm(reader, bias)
        else:
            taken = reader.op == "aten.add.Tensor" and self._by_sum(reader, conv, bias)
        if taken:
            self._change(conv, bias=None)
            self.count += 1

    def _reader(self, value: str) -> Node | None:
        """The one node that reads ``value``, as far as it has been changed."""
        users = {u.name for u in self.users.get(value, [])}
        return self.nodes[users.pop()] if len(users) == 1 and value not in self.program.outputs else None

    def _by_norm(self, norm: Node, bias: str) -> bool:
        add = norm.args["add"]
        if add is None:
            name = self.names.fresh(f"{bias}.row")
            self.weights[name] = Moved(lambda b: b[None], self.weights[bias])
            self._change(norm, add=Ref(name))
            return True
        source = self.nodes.get(self.made.get(add.name, ""))
        if source is None or source.op != _LINEAR or self._reader(add.name) is None:
            return False
        return self._onto(source, bias)

    def _by_sum(self, total: Node, conv: Node, bias: str) -> bool:
        operands = [total.args["self"], total.args["other"]]
        if total.args["alpha"] != 1 or not all(isinstance(o, Ref) for o in operands) or operands[0] == operands[1]:
            return False
        (other,) = (o for o in operands if o != Ref(conv.outputs[0]))
        source = self.nodes.get(self.made.get(other.name, ""))
        if source is None or source.op != _CONV or self._reader(other.name) is None or not self.constant(source):
            return False
        here, there = (spec_of(self.program, n) for n in (conv.outputs[0], other.name))
        if here is None or there is None or here.shape != there.shape or here.dtype != there.dtype:
            return False
        points, others = (tuple(self.weights[n.args["weight"].name].shape[2:]) == (1, 1) for n in (conv, source))
        return (others or not points) and self._onto(source, bias)

    def _onto(self, source: Node, bias: str) -> bool:
        """Add the weight ``bias`` to the bias of ``source``."""
        own = source.args["bias"]
        if own is None:
            self._change(source, bias=Ref(bias))
            return True
        if own.name not in self.weights:
            return False
        name = self.names.fresh(f"{own.name}.with.{bias}")
        self.weights[name] = Derived(_sum, self.weights[own.name], self.weights[bias])
        self._change(source, bias=Ref(name))
        return True

    def _change(self, node: Node, **args: Any) -> None:
        now = self.nodes[node.name]
        self.nodes[node.name] = replace(now, args={**now.args, **args})


def _sum(one: Tensor, other: Tensor) -> Tensor:
    return (one.double() + other.double()).to(one.dtype)
