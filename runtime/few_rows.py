"""Linear layers of few rows as one op, where the plan finds a kernel that takes them.

A decoding step is made of such layers.  A library takes longer to begin one than its weight takes to be read, and
chooses the order of its sums by the whole problem, so that a batch has to be cut into samples; the op reads the weight
once for all rows, and a row's bits are its own.  As in :mod:`.upsample`, this is done once sizes and strides are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op
from fusegen.runtime.program import Applied, Node, Program, Ref
from fusegen.runtime.specialize import propagate, spec_of

RULE = "linear layers of few rows"
_OPS = ("aten.linear.default", "runtime.linear")
_ARGUMENTS = (  # the op's in order, those of a node, and what a plain layer has there
    ("x", "input", None), ("weight", "weight", None), ("bias", "bias", None), ("residual", "residual", None),
    ("activation", "activation", "none"), ("multiplier", "multiplier", None),
)  # fmt: skip


@dataclass(frozen=True)
class Few:
    """What a backend takes for few: so many ``rows``, and so many multiply-adds (``work``) of more than one."""

    rows: int
    work: float = math.inf


def folded(
    program: Program, declined: Callable[[Op, tuple[Any, ...]], str | None], deterministic: bool, few: Few
) -> Program:
    """The static ``program``, lowered and its strides known, with the op ``linear`` in the place of each linear layer
    of few rows, or of few a sample where the plan is ``deterministic``: then a sample's layer is the same in any batch.
    ``declined(op, args)``: why no kernel takes them, or None; ``few``: what is few to the backend.
    """
    op = registry.get("linear")
    if not op.kernels:
        return program
    nodes: list[Node] = []
    left: list[str] = []
    count = 0
    for node in program.nodes:
        if node.op in _OPS and _fits(node, program, deterministic, few):
            made = {name: node.args.get(own, plain) for name, own, plain in _ARGUMENTS}
            metas = (spec_of(program, v.name).meta() if isinstance(v, Ref) else v for v in made.values())
            reason = declined(op, tuple(metas))
            if reason is None:
                count += 1
                node = replace(node, op="fusegen.linear.default", args=made)
            else:
                left.append(f"{node.name}: {reason}")
        nodes.append(node)
    if count or left:
        program = replace(program, applied=(*program.applied, Applied(RULE, count, tuple(left))))
    return propagate(replace(program, nodes=tuple(nodes))) if count else program


def _fits(node: Node, program: Program, deterministic: bool, limit: Few) -> bool:
    """Whether the layer has few rows, and its weight is of their dtype."""
    x, weight = (spec_of(program, node.args[k].name) for k in ("input", "weight"))
    rows = math.prod((x.sizes[1:] if deterministic else x.sizes)[:-1])
    few = rows == 1 or (rows <= limit.rows and rows * math.prod(weight.sizes) <= limit.work)
    return few and x.nbytes > 0 and weight.nbytes > 0 and x.dtype == weight.dtype
