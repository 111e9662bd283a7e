"""What the rewrites need to know of a Program: specs of all values, purity of operators, and an editor of its nodes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fusegen.kernels import op as registry
from fusegen.runtime.program import Node, Program, Ref, TensorSpec, substitute
from fusegen.runtime.read import operators

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Arguments that turn a randomised operator into a plain one, and the value that does so.
_NOT_RANDOM: Mapping[str, Any] = {"dropout_p": 0.0, "p": 0.0, "train": False}


@functools.cache
def overload(op: str) -> Any:
    """The ``torch._ops.OpOverload`` of a node's op; fusegen's own are registered first.  Raises GraphError."""
    if op.startswith("fusegen."):
        registry.ops()
    return operators.resolve(op, trust=True)


@functools.cache
def _effects(op: str) -> tuple[bool, bool]:
    """Whether an operator writes to its arguments, and whether it draws random numbers."""
    if op.startswith(("sym.", "runtime.")):
        return False, False
    if op.startswith("fusegen."):
        registry.ops()
        handle = getattr(getattr(torch.ops.fusegen, op.split(".")[1]), op.split(".")[2])
    else:
        handle = overload(op)
    return handle._schema.is_mutable, torch.Tag.nondeterministic_seeded in handle.tags


def is_pure(node: Node) -> bool:
    """Whether the node's outputs depend on nothing but its arguments, and nothing else depends on its running."""
    writes, random = _effects(node.op)
    if writes or not node.outputs:
        return False
    return not random or any(k in node.args and node.args[k] == v for k, v in _NOT_RANDOM.items())


def spec_of(program: Program, name: str) -> TensorSpec | None:
    """What is known of a value: input, weight or node output."""
    if name in program.specs:
        return program.specs[name]
    if name in program.inputs:
        return program.inputs[name]
    weight = program.weights.get(name)
    return None if weight is None else TensorSpec(tuple(weight.shape), weight.dtype)


@dataclass
class Names:
    """Makes names that nothing in a program has."""

    taken: set[str]

    @staticmethod
    def of(program: Program) -> Names:
        """Those of ``program`` are taken."""
        made = {o for n in program.nodes for o in (n.name, *n.outputs)}
        return Names(made | set(program.inputs) | set(program.weights))

    def fresh(self, base: str) -> str:
        """``base``, or ``base_1``, ``base_2`` …"""
        name, count = base, 0
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name


@dataclass
class Edit:
    """Walks a program's nodes and builds the next program.

    ``forward`` sends the uses of a value to another; every later use, and the outputs, follow.
    """

    program: Program
    nodes: list[Node] = field(default_factory=list)
    table: dict[str, Ref] = field(default_factory=dict)

    def forward(self, name: str, to: str) -> None:
        """Use ``to`` wherever ``name`` is used from here on."""
        self.table[name] = self.table.get(to, Ref(to))

    def resolved(self, node: Node) -> Node:
        """The node with its arguments sent on."""
        if not self.table or not any(n in self.table for n in node.inputs()):
            return node
        return replace(node, args={k: substitute(v, self.table) for k, v in node.args.items()})

    def finish(self) -> Program:
        """The program of the nodes kept."""
        outputs = tuple(self.table[o].name if o in self.table else o for o in self.program.outputs)
        return replace(self.program, outputs=outputs).with_nodes(tuple(self.nodes))

    def may_forward(self, name: str, to: str) -> bool:
        """Whether ``name`` can be sent to ``to``: an output must stay a value of its own, not an input or a weight."""
        if name not in self.program.outputs:
            return True
        to = self.table[to].name if to in self.table else to
        return to not in self.program.inputs and to not in self.program.weights and to not in self.program.outputs


def without_dead(program: Program) -> tuple[Program, int]:
    """Drop pure nodes whose outputs nothing uses, and weights nothing uses; also how many nodes went."""
    used, kept = set(program.outputs), []
    for node in reversed(program.nodes):
        if used.isdisjoint(node.outputs) and is_pure(node):
            continue
        used.update(node.inputs())
        kept.append(node)
    weights = {k: v for k, v in program.weights.items() if k in used}
    dropped = len(program.nodes) - len(kept)
    if not dropped and len(weights) == len(program.weights):
        return program, 0
    return replace(program, weights=weights).with_nodes(tuple(reversed(kept))), dropped


def rank(program: Program, value: Any) -> int | None:
    """Number of dimensions of the value a :class:`Ref` names, where known."""
    spec = spec_of(program, value.name) if isinstance(value, Ref) else None
    return None if spec is None else len(spec.shape)


def tensors(values: Iterable[Any]) -> Iterable[str]:
    """Names of the tensors among argument values, lists opened."""
    for value in values:
        if isinstance(value, Ref):
            yield value.name
        elif isinstance(value, tuple):
            yield from tensors(value)
