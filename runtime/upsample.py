"""A nearest 2x upsampling and the convolution after it as one op, where a kernel takes them: Winograd's form of it, or
its four phases, by taps that a session packs (``packed_conv2d``) or by filters as they are (``upsample2x_conv``).

It is done once the sizes, strides and device are known, not by a spelling: where no kernel of ours is faster, the two
nodes stay the library's.  The filters depend on the weight alone, so a session works them out once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op
from fusegen.runtime import direct_conv
from fusegen.runtime.program import Applied, Node, Program, Ref
from fusegen.runtime.rewrite.graph import Names, without_dead
from fusegen.runtime.specialize import propagate, spec_of

RULE = "upsampling and convolution are one"
FEW = 64  # input channels below which Winograd's form gains little: 24 1.04 times as fast, 48 0.88, 64 1.66
_PLAIN = {
    "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1,
    "residual": None, "activation": "none", "multiplier": None,
}  # fmt: skip


def folded(program: Program, declined: Callable[[Op, tuple[Any, ...]], str | None], unpacked: str | None) -> Program:
    """The static ``program``, lowered and its strides known, with one op in the place of the two nodes where a
    kernel takes it.  ``declined(op, args)``: why none does, or None; ``unpacked``: why the backend has other kernels
    for all convolutions by packed taps.
    """
    made = {o: n for n in program.nodes for o in n.outputs}
    users, names = program.users(), Names.of(program)
    nodes: list[Node] = []
    left: list[str] = []
    count = 0
    for node in program.nodes:
        before = made.get(node.args["input"].name) if node.op == "runtime.conv2d" else None
        fused = None
        if before is not None and _fits(node, before, program) and len(users[before.outputs[0]]) == 1:
            fused = _fused(node, before, program, declined, names, unpacked)
        if isinstance(fused, str):
            left.append(f"{node.name}: {fused}")
        count += isinstance(fused, list)
        nodes += fused if isinstance(fused, list) else [node]
    if count or left:
        program = replace(program, applied=(*program.applied, Applied(RULE, count, tuple(left))))
    return propagate(without_dead(replace(program, nodes=tuple(nodes)))[0]) if count else program


def doubles(node: Node, program: Program) -> bool:
    """Whether ``node`` is a nearest upsampling to twice the height and the width."""
    if node.op != "aten.upsample_nearest2d.vec" or node.args["scale_factors"] not in (None, (2.0, 2.0)):
        return False
    small, large = (spec_of(program, name).sizes for name in (node.args["input"].name, node.outputs[0]))
    return large[2:] == (2 * small[2], 2 * small[3])


def _fits(conv: Node, before: Node, program: Program) -> bool:
    """Whether ``conv`` is a plain 3x3 convolution by a weight of the program, and ``before`` doubles both sides."""
    weight = conv.args["weight"]
    return (
        doubles(before, program)
        and before.outputs[0] not in program.outputs
        and isinstance(weight, Ref)
        and weight.name in program.weights
        and tuple(program.weights[weight.name].shape[2:]) == (3, 3)
        and all(conv.args[k] == v for k, v in _PLAIN.items())
    )


def _fused(
    conv: Node, before: Node, program: Program, declined: Callable[..., str | None], names: Names, unpacked: str | None
) -> list[Node] | str:
    """The filters and the op in the place of the two nodes, or why no kernel takes it."""
    given = (before.args["input"], conv.args["weight"], conv.args["bias"])
    x, weight, bias = (None if v is None else spec_of(program, v.name).meta() for v in given)
    assert x is not None and weight is not None
    if x.dtype != weight.dtype:
        return f"x is {x.dtype} and the weight {weight.dtype}"
    reasons = []
    for form in _forms(x, weight, unpacked):
        (filters,) = registry.get(form.filters).allocate(weight, **form.more)
        reason = declined(
            registry.get(form.op), tuple({**form.args, "x": x, form.takes: filters, "bias": bias}.values())
        )
        if reason is None:
            ref = Ref(names.fresh(f"{given[1].name}.{form.name}"))
            args = {**form.args, "x": given[0], form.takes: ref, "bias": given[2]}
            made = Node(ref.name, f"fusegen.{form.filters}.default", {"weight": given[1], **form.more}, (ref.name,))
            return [made, replace(conv, op=f"fusegen.{form.op}.default", args=args)]
        reasons.append(reason)
    return "; ".join(reasons)


@dataclass(frozen=True)
class _Form:
    """A form of the two nodes: its op, with its arguments in order, x, bias and what it ``takes`` yet to come, and the
    op that makes this of the weight, told ``more``, with a name for it."""

    op: str
    filters: str
    name: str
    takes: str
    args: Mapping[str, Any]
    more: Mapping[str, Any]


def _forms(x: Tensor, weight: Tensor, unpacked: str | None) -> list[_Form]:
    """The forms to ask kernels for: in phases on tiles, 16 products a pixel of x, Winograd's, 9, and the phases."""
    phases = _Form(
        "upsample2x_conv", "upsample2x_filters", "phases", "filters", dict.fromkeys(("x", "filters", "bias")), {}
    )
    if x.dtype != torch.bfloat16:
        return [phases]
    more = {"outputs": weight.shape[0], "bias": None, "residual": None}
    winograd = _Form(
        "winograd_conv2d", "conv_taps", "winograd", "filters",
        {"x": None, "filters": None, **more, "doubled": True}, {"doubled": False},
    )  # fmt: skip
    packed = _Form(
        "packed_conv2d", "conv_taps", "taps", "taps",
        {"x": None, "taps": None, **more, "stride": 1, "doubled": True}, {"doubled": True},
    )  # fmt: skip
    tiles = unpacked is None and min(weight.shape[:2]) >= direct_conv.FEW
    return [*([packed] if tiles else []), *([winograd] if x.shape[1] >= FEW else []), phases]
