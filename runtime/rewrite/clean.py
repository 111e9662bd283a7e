"""Rewrites that leave every value as it was: no-ops go, equal calls become one, constants are worked out once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from fusegen.runtime.derived import Weight, value
from fusegen.runtime.errors import GraphError
from fusegen.runtime.program import Node, Program, Ref, TensorSpec, substitute
from fusegen.runtime.read.operators import complete
from fusegen.runtime.rewrite.graph import Edit, is_pure, overload, spec_of, without_dead

FOLD_ELEMENTS = 1 << 16  # a folded constant, and each of the tensors it is made from, has at most so many

Test = Callable[[Program, Node], bool]


def _same(program: Program, node: Node) -> bool:
    """The output has the first argument's shape and dtype."""
    spec = spec_of(program, node.outputs[0])
    return spec is not None and spec == spec_of(program, first(node))


def first(node: Node) -> str:
    """The name of the node's first argument."""
    value = next(iter(node.args.values()))
    return value.name if isinstance(value, Ref) else ""


def _always(_: Program, __: Node) -> bool:
    return True


def _not_training(_: Program, node: Node) -> bool:
    return node.args["train"] is False or node.args["p"] == 0


def _whole_slice(program: Program, node: Node) -> bool:
    return node.args["start"] in (0, None) and node.args["step"] == 1 and _same(program, node)


def _by_one(program: Program, node: Node) -> bool:
    return isinstance(node.args["other"], (int, float)) and node.args["other"] == 1 and _same(program, node)


def _plus_zero(program: Program, node: Node) -> bool:
    """Adding zero to integers; to floats it would turn -0 into 0."""
    spec = spec_of(program, node.outputs[0])
    zero = isinstance(node.args["other"], int) and node.args["other"] == 0
    return zero and spec is not None and not spec.dtype.is_floating_point and _same(program, node)


def _divided(program: Program, node: Node) -> bool:
    return node.args.get("rounding_mode") is None and _by_one(program, node)


# What does nothing at inference: the op, and the test of the node that makes sure.  Its first argument takes its place.
# Memory layout and storage do not count: kernels take any strides, and nothing writes to a value.
NO_OPS: Mapping[str, Test] = {
    "aten.dropout.default": _not_training,
    "aten.feature_dropout.default": _not_training,
    "aten.alpha_dropout.default": _not_training,
    "aten.feature_alpha_dropout.default": _not_training,
    "aten.contiguous.default": _always,
    "aten.clone.default": _always,
    "aten.detach.default": _always,
    "aten.alias.default": _always,
    "aten.lift_fresh_copy.default": _always,
    "aten.positive.default": _always,
    "aten.resolve_conj.default": _same,
    "aten.resolve_neg.default": _same,
    "aten.to.dtype": _same,
    "aten.view.default": _same,
    "aten.reshape.default": _same,
    "aten.expand.default": _same,
    "aten.flatten.using_ints": _same,
    "aten.unflatten.int": _same,
    "aten.squeeze.dim": _same,
    "aten.squeeze.default": _same,
    "aten.slice.Tensor": _whole_slice,
    "aten.mul.Tensor": _by_one,
    "aten.mul.Scalar": _by_one,
    "aten.div.Tensor": _divided,
    "aten.div.Scalar": _by_one,
    "aten.add.Tensor": _plus_zero,
    "aten.sub.Tensor": _plus_zero,
}
# Checks of what the exporter knew, without outputs.
_CHECKS = ("aten._assert", "aten.sym_constrain_range", "aten._functional_assert")
# Spelled otherwise, the same meaning: the op -> the one spelling, which takes the arguments of the same names.
_CASTS = {"aten.to.dtype_layout", "aten.to.device", "aten.to.other", "aten.type_as.default", "aten._to_copy.default"}
_AS_RESHAPE = {"aten.view.default", "aten._unsafe_view.default", "aten._reshape_copy.default", "aten.view_copy.default"}


def canonical(program: Program) -> tuple[Program, int]:
    """One spelling for each of the views and casts that have several.

    ``view`` becomes ``reshape``, so that nothing depends on the memory order of what a kernel returns; every cast
    becomes ``to.dtype``, moves between devices included (a program runs on one device, the session's).
    """
    nodes = [_canonical(program, n) for n in program.nodes]
    changed = sum(a is not b for a, b in zip(nodes, program.nodes, strict=True))
    return (program.with_nodes(tuple(nodes)) if changed else program), changed


def _canonical(program: Program, node: Node) -> Node:
    if node.op in _AS_RESHAPE and "size" in node.args:
        return replace(node, op="aten.reshape.default", args={"self": node.args["self"], "shape": node.args["size"]})
    if node.op in _CASTS:
        spec = spec_of(program, node.outputs[0])
        if spec is not None:
            given = {"self": node.args["self"], "dtype": spec.dtype}
            return replace(node, op="aten.to.dtype", args=complete(overload("aten.to.dtype"), given, node.name))
    return node


def without_no_ops(program: Program, keep: frozenset[str] = frozenset()) -> tuple[Program, int]:
    """Drop the nodes that do nothing, those named in ``keep`` excepted; also how many went."""
    edit, dropped = Edit(program), 0
    for node in program.nodes:
        if node.op.startswith(_CHECKS) and not node.outputs:
            dropped += 1
            continue
        node = edit.resolved(node)
        test = NO_OPS.get(node.op)
        if test is not None and node.name not in keep and test(program, node):
            if edit.may_forward(node.outputs[0], first(node)):
                edit.forward(node.outputs[0], first(node))
                dropped += 1
                continue
        edit.nodes.append(node)
    return (edit.finish() if dropped else program), dropped


def merged_reshapes(program: Program) -> tuple[Program, int]:
    """A reshape of a reshape reads the first one's input."""
    edit, made, merged = Edit(program), dict[str, Node](), 0
    for node in program.nodes:
        source = made.get(first(node)) if node.op == "aten.reshape.default" else None
        if source is not None:
            node, merged = replace(node, args={**node.args, "self": source.args["self"]}), merged + 1
        if node.op == "aten.reshape.default":
            made[node.outputs[0]] = node
        edit.nodes.append(node)
    return (edit.finish() if merged else program), merged


def without_repeats(program: Program) -> tuple[Program, int]:
    """Equal calls of pure operators become one; also how many went.  A program's outputs stay values of their own."""
    edit, seen, merged = Edit(program), dict[Any, Node](), 0
    for node in program.nodes:
        node = edit.resolved(node)
        if is_pure(node):
            key = (node.op, *(_key(v) for v in node.args.values()))
            same = seen.setdefault(key, node)
            if same is not node and not any(o in program.outputs for o in node.outputs):
                for name, kept in zip(node.outputs, same.outputs, strict=True):
                    edit.forward(name, kept)
                merged += 1
                continue
        edit.nodes.append(node)
    return (edit.finish() if merged else program), merged


def _key(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_key(v) for v in value)
    if isinstance(value, Ref):
        return value
    # 1, 1.0 and True are equal and mean different dtypes; 0.0 and -0.0 are equal, NaN is not: repr tells all apart.
    return type(value), repr(value)


def folded(program: Program) -> tuple[Program, int]:
    """Work out the pure nodes that depend on literals and weights alone, where small; also how many.

    They run on the CPU, in the operators' own eager form, and become weights of the program.
    """
    weights, nodes, count = dict(program.weights), [], 0
    specs = dict(program.specs)
    for node in program.nodes:
        values = _fold(program, node, weights)
        if values is None:
            nodes.append(node)
            continue
        count += 1
        weights.update(zip(node.outputs, values, strict=True))
        specs.update((o, TensorSpec(tuple(v.shape), v.dtype)) for o, v in zip(node.outputs, values, strict=True))
    if not count:
        return program, 0
    return without_dead(replace(program, weights=weights, specs=specs).with_nodes(tuple(nodes)))[0], count


def _fold(program: Program, node: Node, weights: Mapping[str, Weight]) -> tuple[torch.Tensor, ...] | None:
    if not node.op.startswith("aten.") or not is_pure(node) or any(o in program.outputs for o in node.outputs):
        return None
    for name in node.inputs():
        if name not in weights or weights[name].numel() > FOLD_ELEMENTS or weights[name].device.type != "cpu":
            return None
    for name in node.outputs:
        spec = program.specs.get(name)
        if spec is None or any(isinstance(d, str) for d in spec.shape) or _size(spec) > FOLD_ELEMENTS:
            return None
    return _evaluate(node, {name: value(weights[name]) for name in node.inputs()})


def _size(spec: TensorSpec) -> int:
    size = 1
    for d in spec.shape:
        size *= int(d)
    return size


def _evaluate(node: Node, weights: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    handle = overload(node.op)
    args, kwargs = [], {}
    for argument in handle._schema.arguments:
        value = substitute(node.args[argument.name], weights)
        if argument.name == "device":
            value = torch.device("cpu")
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    try:
        with torch.no_grad():
            out = handle(*args, **kwargs)
    except Exception as error:
        raise GraphError(
            f"{node.op} does not fit its arguments: {error}", where=f"node {node.name}, {node.source}"
        ) from None
    return tuple(t.contiguous() for t in (out if isinstance(out, (tuple, list)) else (out,)))
