"""A concatenation or an addition and the group norm that reads it as one op, where a kernel takes them.

Both results are kept: the skip of a U-Net and the residual of a transformer are read again after the norm, so no
spelling can say it.  It is done once the strides are known, as in :mod:`.upsample`: a kernel wants both parts laid out
alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op
from fusegen.runtime.program import Applied, Node, Program, Ref, substitute
from fusegen.runtime.specialize import propagate, spec_of

RULE = "group norm joined with what it reads"
_NORM = "fusegen.group_norm.default"
_EXTRA = ("add", "scale", "shift")


def folded(program: Program, declined: Callable[[Op, tuple[Any, ...]], str | None]) -> Program:
    """The static ``program``, its strides known, with ``join_group_norm`` in the place of the two nodes where a kernel
    takes it.  ``declined(op, args)``: why none does, or None.
    """
    norms: dict[str, Node] = {}  # what a norm reads -> the first norm that does
    for node in program.nodes:
        if node.op == _NORM and all(node.args[k] is None for k in _EXTRA):
            norms.setdefault(node.args["x"].name, node)
    gone: set[str] = set()
    nodes: list[Node] = []
    left: list[str] = []
    for node in program.nodes:
        parts = _parts(node, program) if node.outputs[0] in norms else None
        norm = norms[node.outputs[0]] if parts is not None else None
        if parts is None or norm is None or not _early(norm, program):
            nodes.append(node)
            continue
        joined = replace(norm, op="fusegen.join_group_norm.default", args=_arguments(norm, *parts))
        reason = _declined(joined, program, declined)
        if reason is None:
            gone.add(norm.name)
            joined = replace(joined, name=node.name, outputs=(*norm.outputs, *node.outputs))
        else:
            left.append(f"{norm.name}: {reason}")
        nodes.append(node if reason else joined)
    if gone or left:
        program = replace(program, applied=(*program.applied, Applied(RULE, len(gone), tuple(left))))
    return propagate(replace(program, nodes=tuple(n for n in nodes if n.name not in gone))) if gone else program


def _parts(node: Node, program: Program) -> tuple[Ref, Ref, str] | None:
    """The two tensors that ``node`` joins, and how; None where it does something else."""
    if node.op == "aten.cat.default":
        tensors, dim = node.args["tensors"], node.args["dim"]
        rank, kind = len(spec_of(program, node.outputs[0]).sizes), "concat"
        if len(tensors) != 2 or dim % rank != 1:
            return None
        first, second = tensors
    elif node.op == "aten.add.Tensor" and node.args["alpha"] == 1:
        first, second, kind = node.args["self"], node.args["other"], "add"
    else:
        return None
    if not isinstance(first, Ref) or not isinstance(second, Ref):
        return None
    out, one, other = (spec_of(program, name) for name in (node.outputs[0], first.name, second.name))
    alike = one.dtype == other.dtype == out.dtype and (kind == "concat" or one.sizes == other.sizes)
    return (first, second, kind) if alike else None


def _early(norm: Node, program: Program) -> bool:
    """Whether the norm's parameters are there wherever it is moved to."""
    refs = [norm.args[k] for k in ("weight", "bias") if norm.args[k] is not None]
    return all(r.name in program.weights or r.name in program.inputs for r in refs)


def _arguments(norm: Node, x: Ref, other: Ref, kind: str) -> dict[str, Any]:
    kept = {k: norm.args[k] for k in ("num_groups", "weight", "bias", "eps", "activation")}
    return {"x": x, "other": other, **kept, "kind": kind, "moments": None}


def _declined(joined: Node, program: Program, declined: Callable[..., str | None]) -> str | None:
    metas = {name: spec_of(program, name).meta() for name in joined.inputs()}
    args = tuple(substitute(v, metas) for v in joined.args.values())
    return declined(registry.get("join_group_norm"), args)
