"""Traces the spellings of an op into patterns.

``make_fx`` stops before PyTorch decomposes anything, as ``torch.export`` does, so that both see the same operators.
The trace is cleaned by the same rewrites as a program, and keeps only the arguments that differ from their defaults.
"""

from __future__ import annotations

import inspect
import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fusegen.kernels.op import Spelling
from fusegen.runtime.program import Node, Program, Ref, TensorSpec
from fusegen.runtime.read.operators import complete
from fusegen.runtime.rewrite import clean, patterns
from fusegen.runtime.rewrite import pattern as form
from fusegen.runtime.rewrite.graph import overload, rank, without_dead
from fusegen.runtime.rewrite.pattern import DIMS, HALF, IGNORED, Literal, Pattern

CAST = "aten.to.dtype"


def trace_op(op: str, given: Sequence[Spelling]) -> list[Pattern]:
    """The patterns of all spellings of an op; where one casts, its form in half precision follows."""
    found = []
    for spelling in given:
        program = trace_spelling(spelling, torch.float32)
        found.append(_pattern(op, spelling, program, half=False))
        if any(n.op == CAST for n in program.nodes):
            found.append(_pattern(op, spelling, trace_spelling(spelling, torch.bfloat16), half=True))
    return found


def trace_spelling(spelling: Spelling, dtype: torch.dtype) -> Program:
    """The spelling called with its inputs in ``dtype``, as a program of the canonical operators."""
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in spelling.inputs()]
    with torch.no_grad():
        graph = make_fx(lambda *args: spelling.eager(*args), pre_dispatch=True)(*inputs).graph
    names = wildcards(spelling)
    if len(names) != len(inputs):
        raise ValueError(f"the spelling {spelling.name!r} takes {len(names)} tensors and inputs() gives {len(inputs)}")
    return clean.canonical(_program(spelling.name, graph, names))[0]


def wildcards(spelling: Spelling) -> tuple[str, ...]:
    """The names of the spelling's tensor parameters."""
    parameters = inspect.signature(spelling.eager).parameters.values()
    return tuple(p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY)


def _literals(spelling: Spelling) -> dict[str, Any]:
    parameters = inspect.signature(spelling.eager).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _program(name: str, graph: torch.fx.Graph, names: tuple[str, ...]) -> Program:
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    called = dict(zip((p.name for p in placeholders), names, strict=True))
    inputs = {called[p.name]: _spec(p.meta["val"]) for p in placeholders}
    nodes: list[Node] = []
    specs: dict[str, TensorSpec] = {}
    outputs: tuple[str, ...] = ()
    for node in graph.nodes:
        if node.op == "output":
            outputs = tuple(called.get(a.name, a.name) for a in node.all_input_nodes)
        elif node.op == "get_attr":
            raise ValueError(f"the spelling {name!r} makes a tensor of its own; give it as an input")
        elif node.op == "call_function" and node.target is not operator.getitem:
            nodes.append(_node(node, called))
            values = node.meta["val"] if isinstance(node.meta["val"], (list, tuple)) else [node.meta["val"]]
            specs.update(zip(nodes[-1].outputs, map(_spec, values), strict=True))
    return Program(name, tuple(nodes), inputs, outputs, {}, {}, specs)


def _spec(value: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(value.shape), value.dtype)


def _node(node: torch.fx.Node, called: Mapping[str, str]) -> Node:
    outputs: tuple[str, ...] = (node.name,)
    if isinstance(node.meta["val"], (list, tuple)):
        parts = {u.args[1]: u.name for u in node.users}
        outputs = tuple(parts.get(i, f"{node.name}_{i}") for i in range(len(node.meta["val"])))
    handle: Any = node.target
    given = {a.name: v for a, v in zip(handle._schema.arguments, node.args, strict=False)} | dict(node.kwargs)
    op = f"{handle.namespace}.{handle._opname}.{handle._overloadname}"
    args = {k: _value(v, called) for k, v in given.items()}
    return Node(node.name, op, complete(handle, args, node.name), outputs)


def _value(value: Any, called: Mapping[str, str]) -> Any:
    if isinstance(value, torch.fx.Node):
        return Ref(called.get(value.name, value.name))
    return tuple(_value(v, called) for v in value) if isinstance(value, (list, tuple)) else value


def _pattern(op: str, spelling: Spelling, program: Program, half: bool) -> Pattern:
    cleaned = without_dead(clean.without_no_ops(program)[0])[0]
    if len(cleaned.outputs) != 1 or not cleaned.nodes:
        raise ValueError(f"the spelling {spelling.name!r} of {op} makes no single new tensor")
    literals = _literals(spelling)
    found: dict[str, set[str]] = {}
    # Named by their first output, as in the file.
    nodes = tuple(
        Node(n.outputs[0], n.op, _arguments(cleaned, n, literals, half, found), n.outputs) for n in cleaned.nodes
    )
    missing = sorted(literals.keys() - found)
    if missing:
        raise ValueError(f"the literal {missing[0]!r} of the spelling {spelling.name!r} is not in its trace")
    for name, places in found.items():  # a dimension that happens to equal a default would become wild
        if "dim" in places and len(places) > 1:
            where = " and ".join(sorted(places))
            raise ValueError(f"the literal {name!r} of the spelling {spelling.name!r} stands for {where}: change it")
    return Pattern(op, spelling.name, half, wildcards(spelling), nodes, cleaned.outputs[0])


def _arguments(
    program: Program, node: Node, literals: Mapping[str, Any], half: bool, found: dict[str, set[str]]
) -> dict[str, Any]:
    """The arguments that differ from their defaults, with literals and dtypes made wild."""
    bare = {a.name: Ref("") for a in overload(node.op)._schema.arguments if not a.has_default_value()}
    defaults = complete(overload(node.op), bare, node.name)
    size = rank(program, next(iter(node.args.values())))
    out: dict[str, Any] = {}
    for name, value in node.args.items():
        if (node.op, name) in IGNORED:
            continue
        literal = next((k for k, v in literals.items() if type(v) is type(value) and v == value), None)
        if literal is not None:
            found.setdefault(literal, set()).add(name)
            out[name] = Literal(literal)
        elif name in bare or name in DIMS.get(node.op, ()) or repr(value) != repr(defaults[name]):
            out[name] = HALF if half and value is torch.bfloat16 else form.from_end(node.op, name, value, size)
    return out


def document() -> dict[str, Any]:
    """The patterns of every op, traced anew, as :data:`patterns.FILE` holds them."""
    return {
        op: {"digest": patterns.digest(op, given), "patterns": [form.to_json(p) for p in trace_op(op, given)]}
        for op, given in patterns.spellings().items()
    }


if __name__ == "__main__":
    patterns.FILE.write_text(json.dumps(document(), indent=1) + "\n", encoding="utf-8")
