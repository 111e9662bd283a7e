"""The statistics of a group norm from the convolution that makes what it reads, where the plan finds kernels for it.

The convolution leaves each channel's mean and variance (``winograd_conv2d_moments``, ``packed_conv2d_moments``), and
the norm goes through memory once.  Where two convolutions' outputs are concatenated for it, both leave theirs.  Others
may read the convolution's output too.  It is done once the plan has a form of it that can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op
from fusegen.runtime.program import Applied, Node, Program, Ref, substitute
from fusegen.runtime.rewrite.graph import Names
from fusegen.runtime.specialize import propagate, spec_of

RULE = "group norm by the moments that a convolution leaves"
# Bytes of a sample below which a norm's second reading costs no more than the moments do.  On a Zen 5 in bfloat16 both
# together took 0.97 to 1.00 of the time from 4 MiB on, 1.00 to 1.01 at 1 to 3 MiB, 1.12 at 640 KiB.
LEAST = 1 << 22
_NORM, _JOINED, _CAT = "fusegen.group_norm.default", "fusegen.join_group_norm.default", "aten.cat.default"
_LEAVES = {f"fusegen.{n}.default": f"{n}_moments" for n in ("winograd_conv2d", "packed_conv2d")}


def folded(program: Program, declined: Callable[[Op, tuple[Any, ...]], str | None]) -> Program:
    """The static ``program``, its strides known, with the moments in each group norm of a large image by such
    convolutions where kernels take all of them.  ``declined(op, args)``: why none does, or None.
    """
    names, makes = Names.of(program), {n.outputs[0]: n for n in program.nodes if n.op in _LEAVES}
    left: list[str] = []
    leaves: dict[str, Node] = {}  # a convolution's output -> the one that leaves moments
    norms: dict[str, list[Node]] = {}  # a norm -> it by moments, behind what puts these together
    for norm in program.nodes:
        parts = [makes.get(image) for image in _reads(norm)]
        made = [part for part in parts if part is not None]
        if not made or len(made) < len(parts) or _small(program, norm):
            continue
        both = [leaves.get(n.outputs[0]) or _leaving(n, names.fresh(f"{n.outputs[0]}.moments")) for n in made]
        by = _by(norm, [n.outputs[1] for n in both], names)
        reason = _declined(both, by[-1], program, declined)
        if reason is None:
            leaves |= {n.outputs[0]: n for n in both}
            norms[norm.name] = by
        else:
            left.append(f"{norm.name}: {reason}")
    if norms or left:
        program = replace(program, applied=(*program.applied, Applied(RULE, len(norms), tuple(left))))
    nodes = [m for n in program.nodes for m in norms.get(n.name, [leaves.get(n.outputs[0], n)])]
    return propagate(replace(program, nodes=tuple(nodes))) if norms else program


def _reads(norm: Node) -> tuple[str, ...]:
    """The images that a norm without moments normalizes; () where it is another node."""
    if norm.op == _JOINED and norm.args["kind"] == "concat" and norm.args["moments"] is None:
        return norm.args["x"].name, norm.args["other"].name
    return (norm.args["x"].name,) if norm.op == _NORM and norm.args["moments"] is None else ()


def _small(program: Program, norm: Node) -> bool:
    spec = spec_of(program, norm.outputs[0])
    return spec.nbytes < LEAST * max(spec.sizes[0], 1)


def _leaving(made: Node, moments: str) -> Node:
    return replace(made, op=f"fusegen.{_LEAVES[made.op]}.default", outputs=(made.outputs[0], moments))


def _by(norm: Node, moments: list[str], names: Names) -> list[Node]:
    """The norm by these, behind the node that puts those of two images one after the other."""
    nodes, own = [], moments[0]
    if len(moments) > 1:
        own = names.fresh(f"{norm.name}.moments")
        nodes.append(Node(own, _CAT, {"tensors": tuple(Ref(m) for m in moments), "dim": 2}, (own,)))
    return [*nodes, replace(norm, args={**norm.args, "moments": Ref(own)})]


def _declined(both: list[Node], norm: Node, program: Program, declined: Callable[..., str | None]) -> str | None:
    """Why there is no kernel for a convolution, or for the norm."""
    made = {norm.args["moments"].name, *(n.outputs[1] for n in both)}
    given = {name for n in (*both, norm) for name in n.inputs()} - made
    metas = {name: spec_of(program, name).meta() for name in given}
    moments = []
    for node in both:
        leaves, args = registry.get(node.op.split(".")[1]), tuple(substitute(v, metas) for v in node.args.values())
        if (reason := declined(leaves, args)) is not None:
            return reason
        moments.append(leaves.allocate(*args)[1])
    metas[norm.args["moments"].name] = torch.cat(moments, 2)
    return declined(registry.get(norm.op.split(".")[1]), tuple(substitute(v, metas) for v in norm.args.values()))
