"""A 3x3 convolution by Winograd's algorithm, where the plan finds a kernel that takes it.

As in :mod:`.upsample`, it is done once sizes and strides are known, and the filters, which depend on the weight alone,
are worked out once a session.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op
from fusegen.runtime.program import Applied, Node, Program, Ref
from fusegen.runtime.rewrite.graph import Names, without_dead
from fusegen.runtime.specialize import propagate, spec_of

FEW = 16  # input channels below which the transforms cost what they save
RULE = "3x3 convolution by Winograd's algorithm"
# The op that makes a weight's filters, of larger tiles where products are of float32, of smaller ones for bfloat16, and
# the input channels it takes.  On a Zen 5 in bfloat16 16 took up to twice as long as oneDNN, 24 0.87 times.
_FILTERS = {torch.float32: ("winograd_filters", FEW), torch.bfloat16: ("winograd_pair_filters", 24)}
_PLAIN = {
    "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "activation": "none", "multiplier": None,
}  # fmt: skip


def folded(program: Program, declined: Callable[[Op, tuple[Any, ...]], str | None]) -> Program:
    """The static ``program``, lowered and its strides known, with ``winograd_conv2d`` in the place of each convolution
    that a kernel takes.  ``declined(op, args)``: why none does, or None.
    """
    if not registry.get("winograd_conv2d").kernels:
        return program
    names, made = Names.of(program), dict[str, str]()
    nodes: list[Node] = []
    left: list[str] = []
    count = 0
    for node in program.nodes:
        reason = _declined(node, program, declined) if _fits(node, program) else ""
        if reason is not None:
            left += [f"{node.name}: {reason}"] if reason else []
            nodes.append(node)
            continue
        count += 1
        weight = node.args["weight"]
        if weight.name not in made:
            made[weight.name] = name = names.fresh(f"{weight.name}.winograd")
            nodes.append(Node(name, f"fusegen.{_filters(weight, program)}.default", {"weight": weight}, (name,)))
        args = {"x": node.args["input"], "filters": Ref(made[weight.name]), "outputs": _outputs(node, program)}
        args |= {k: node.args[k] for k in ("bias", "residual")}
        nodes.append(replace(node, op="fusegen.winograd_conv2d.default", args=args))
    if count or left:
        program = replace(program, applied=(*program.applied, Applied(RULE, count, tuple(left))))
    return propagate(without_dead(replace(program, nodes=tuple(nodes)))[0]) if count else program


def _fits(node: Node, program: Program) -> bool:
    """Whether ``node`` is a plain 3x3 convolution of enough channels by a weight of the program."""
    given = node.args["weight"] if node.op == "runtime.conv2d" else None
    weight = program.weights.get(given.name) if isinstance(given, Ref) else None
    return (
        weight is not None
        and weight.dtype in _FILTERS
        and tuple(weight.shape[2:]) == (3, 3)
        and weight.shape[1] >= _FILTERS[weight.dtype][1]
        and all(node.args[k] == v for k, v in _PLAIN.items())
    )


def _filters(weight: Ref, program: Program) -> str:
    return _FILTERS[program.weights[weight.name].dtype][0]


def _outputs(node: Node, program: Program) -> int:
    return int(program.weights[node.args["weight"].name].shape[0])


def _declined(node: Node, program: Program, declined: Callable[..., str | None]) -> str | None:
    names = (node.args["input"], node.args["weight"], node.args["bias"], node.args["residual"])
    x, weight, bias, residual = (None if v is None else spec_of(program, v.name).meta() for v in names)
    assert x is not None and weight is not None
    (filters,) = registry.get(_filters(node.args["weight"], program)).allocate(weight)
    return declined(registry.get("winograd_conv2d"), (x, filters, _outputs(node, program), bias, residual))
