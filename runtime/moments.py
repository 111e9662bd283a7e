"""The statistics of a group norm from the convolution that makes what it reads, where the plan finds kernels for it.

The convolution leaves each channel's mean and variance (``winograd_conv2d_moments``, ``packed_conv2d_moments``), and
the norm goes through memory once.  Others may read the convolution's output too.  It is done once the plan has a form
of it that can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op
from fusegen.runtime.program import Applied, Node, Program, Ref, substitute
from fusegen.runtime.rewrite.graph import Names
from fusegen.runtime.specialize import propagate, spec_of

RULE = "group norm by the moments that a convolution leaves"
# Bytes of a sample below which a norm's second reading costs no more than the moments do.  On a Zen 5 in bfloat16 both
# together took 0.97 to 1.00 of the time from 4 MiB on, 1.00 to 1.01 at 1 to 3 MiB, 1.12 at 640 KiB.
LEAST = 1 << 22
_NORM = "fusegen.group_norm.default"
_LEAVES = {f"fusegen.{n}.default": f"{n}_moments" for n in ("winograd_conv2d", "packed_conv2d")}


def folded(program: Program, declined: Callable[[Op, tuple[Any, ...]], str | None]) -> Program:
    """The static ``program``, its strides known, with the moments in each group norm of a large image by such a
    convolution where kernels take both.  ``declined(op, args)``: why none does, or None.
    """
    names, makes = Names.of(program), {n.outputs[0]: n for n in program.nodes if n.op in _LEAVES}
    left: list[str] = []
    leaves: dict[str, Node] = {}  # a convolution's output -> the one that leaves moments
    norms: dict[str, Node] = {}
    for norm in program.nodes:
        made = makes.get(norm.args["x"].name) if norm.op == _NORM and norm.args["moments"] is None else None
        if made is None or _small(program, made):
            continue
        image = made.outputs[0]
        both = leaves.get(image) or _leaving(made, image, names.fresh(f"{image}.moments"))
        by = replace(norm, args={**norm.args, "moments": Ref(both.outputs[1])})
        reason = _declined(both, by, program, declined)
        if reason is None:
            leaves[image], norms[norm.name] = both, by
        else:
            left.append(f"{norm.name}: {reason}")
    if norms or left:
        program = replace(program, applied=(*program.applied, Applied(RULE, len(norms), tuple(left))))
    nodes = tuple(norms.get(n.name) or leaves.get(n.outputs[0], n) for n in program.nodes)
    return propagate(replace(program, nodes=nodes)) if norms else program


def _leaving(made: Node, image: str, own: str) -> Node:
    return replace(made, op=f"fusegen.{_LEAVES[made.op]}.default", outputs=(image, own))


def _small(program: Program, made: Node) -> bool:
    spec = spec_of(program, made.outputs[0])
    return spec.nbytes < LEAST * max(spec.sizes[0], 1)


def _declined(both: Node, norm: Node, program: Program, declined: Callable[..., str | None]) -> str | None:
    """Why there is no kernel for the convolution, or for the norm."""
    leaves, of = registry.get(both.op.split(".")[1]), registry.get("group_norm")
    given = tuple(n for n in (*both.inputs(), *norm.inputs()) if n != both.outputs[1])
    metas = {name: spec_of(program, name).meta() for name in given}
    args = tuple(substitute(v, metas) for v in both.args.values())
    reason = declined(leaves, args)
    metas[both.outputs[1]] = leaves.allocate(*args)[1]
    return reason or declined(of, tuple(substitute(v, metas) for v in norm.args.values()))
