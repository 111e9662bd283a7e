"""A residual addition and the norm that reads its sum as one op, where a kernel takes them.

The blocks of diffusion transformers end so with a gate (adaLN-Zero, Peebles & Xie 2023): x + gate * branch, then the
next layer's modulated norm; other transformers' without one, where no product of the backend took the addition.  The
sum is read again by the next addition, so no spelling can say it.  As in :mod:`.join`, it is done once sizes and
strides are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op
from fusegen.runtime.program import Applied, Node, Program, Ref, substitute
from fusegen.runtime.specialize import propagate, spec_of

RULE = "norm joined with the addition it reads"
_NORMS = {"fusegen.layer_norm.default": "layer", "fusegen.rms_norm.default": "rms"}
_JOINED = "fusegen.add_norm.default"


def folded(program: Program, declined: Callable[[Op, tuple[Any, ...]], str | None]) -> Program:
    """The static ``program``, its strides known, with ``add_norm`` in the place of the product with the gate (if there
    is one), the addition and its first norm, where a kernel takes it.  ``declined(op, args)``: why none does, or None.
    """
    made = {o: n for n in program.nodes for o in n.outputs}
    users = program.users()
    fused: dict[str, Node] = {}  # norm -> the op
    gone: set[str] = set()
    left: list[str] = []
    for norm in program.nodes:
        total = made.get(norm.args["x"].name) if norm.op in _NORMS else None
        if total is None or total.name in gone or users[total.outputs[0]][0] is not norm:
            continue
        parts = _parts(total, made, users, program)
        if parts is None:
            continue
        product, joined = parts[0], _joined(norm, total, *parts[1:])
        reason = _declined(joined, program, declined)
        if reason is None:
            fused[norm.name] = joined
            gone |= {total.name} if product is None else {total.name, product}
        else:
            left.append(f"{norm.name}: {reason}")
    if fused or left:
        program = replace(program, applied=(*program.applied, Applied(RULE, len(fused), tuple(left))))
    nodes = tuple(fused.get(n.name, n) for n in program.nodes if n.name not in gone)
    return propagate(replace(program, nodes=nodes)) if fused else program


def _parts(
    total: Node, made: Mapping[str, Node], users: Mapping[str, list[Node]], program: Program
) -> tuple[str | None, Ref, Ref, Ref | None] | None:
    """The name of the node that makes gate * branch, then x, branch and gate; no name and no gate where the branch has
    none.  None where ``total`` is another sum."""
    if total.op != "aten.add.Tensor" or total.args["alpha"] != 1:
        return None
    operands = total.args["self"], total.args["other"]
    for x, scaled in (operands, operands[::-1]):
        product = made.get(scaled.name) if isinstance(scaled, Ref) and isinstance(x, Ref) else None
        if product is None or product.op != "aten.mul.Tensor" or users[scaled.name] != [total]:
            continue
        factors = product.args["self"], product.args["other"]
        if scaled.name in program.outputs or not all(isinstance(f, Ref) for f in factors):
            continue
        for gate, branch in (factors, factors[::-1]):
            if _alike(x, branch, program) and _alike(x, Ref(total.outputs[0]), program):
                return product.name, x, branch, gate
    x, branch = operands
    if isinstance(x, Ref) and isinstance(branch, Ref):
        if _alike(x, branch, program) and _alike(x, Ref(total.outputs[0]), program):
            return None, x, branch, None
    return None


def _alike(x: Ref, other: Ref, program: Program) -> bool:
    one, two = spec_of(program, x.name), spec_of(program, other.name)
    return one.sizes == two.sizes and one.dtype == two.dtype


def _joined(norm: Node, total: Node, x: Ref, branch: Ref, gate: Ref | None) -> Node:
    """The op in the place of the norm; its outputs keep the names of norm and sum."""
    kind = _NORMS[norm.op]
    kept = {k: norm.args.get(k) for k in ("weight", "bias", "scale", "shift")}
    args = {"x": x, "branch": branch, "gate": gate, **kept, "eps": norm.args["eps"]}
    args |= {"kind": kind, "offset": norm.args.get("offset", 0.0)}
    return replace(norm, op=_JOINED, args=args, outputs=(*norm.outputs, *total.outputs))


def _declined(joined: Node, program: Program, declined: Callable[..., str | None]) -> str | None:
    op = registry.get("add_norm")
    metas = {name: spec_of(program, name).meta() for name in joined.inputs()}
    args = tuple(substitute(v, metas) for v in joined.args.values())
    try:
        op.allocate(*args)
    except ValueError as error:  # a gate of another shape than one modulates with
        return str(error)
    return declined(op, args)
