"""Fuses what follows a linear layer or a convolution into it, in a static program.

The node vocabulary, for backends:

``runtime.linear``: ``input, weight, bias, residual, activation, multiplier`` and
``runtime.conv2d``: ``input, weight, bias, residual, activation, multiplier, stride, padding, dilation, groups`` mean

    activation(product(input, weight) + bias + residual) * multiplier

``bias``, ``residual`` and ``multiplier`` may be None; ``residual`` and ``multiplier`` have the output's shape and
dtype.  ``activation`` is one of the ``ACTIVATIONS`` of the op ``linear_int8``.  Where there is a ``multiplier``, there
is no residual and no activation, so that no node asks for more than a library's post-operators.  A fused node rounds
once where the graph rounded after each operator.

:data:`EAGER` holds what they mean in eager PyTorch; called on meta tensors, it gives their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusegen.kernels.linear_int8 import ACTIVATIONS
from fusegen.runtime.derived import Moved, Weight
from fusegen.runtime.program import Applied, Node, Program, Ref, TensorSpec
from fusegen.runtime.read.operators import complete
from fusegen.runtime.rewrite import gates as gates_of
from fusegen.runtime.rewrite.graph import Names, overload, spec_of, without_dead

_FUSED = {"aten.linear.default": "runtime.linear", "aten.conv2d.default": "runtime.conv2d"}
# Ops that fuse the same themselves, as act(product + bias) + residual.
_OWN = ("fusegen.linear_int8.default", "fusegen.conv2d_int8.default")
# What is fused -> the arguments that must be unused for it: in a product, and in an op of our own.
_ALL = ("residual", "activation", "multiplier")
_FREE: Mapping[str, tuple[str, ...]] = {"activation": _ALL[1:], "residual": _ALL, "multiplier": _ALL}
_FREE_OWN: Mapping[str, tuple[str, ...]] = {"activation": _ALL[:2], "residual": _ALL[:1]}
# The linear layers that are merged -> their input and what has a row for each output feature.
_MERGED: Mapping[str, tuple[str, ...]] = {
    "aten.linear.default": ("input", "weight", "bias"), "fusegen.linear_int8.default": ("x", "weight", "scale", "bias"),
}  # fmt: skip
_SPLIT = "aten.split_with_sizes.default"


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    multiplier: Tensor | None = None,
) -> Tensor:
    """``runtime.linear``: input (*, I), weight (O, I), bias (O,), residual and multiplier (*, O) -> (*, O)."""
    return _after(F.linear(input, weight, bias), residual, activation, multiplier)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    multiplier: Tensor | None = None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """``runtime.conv2d``: input (B, C, H, W), weight (O, C / groups, kh, kw) -> (B, O, H', W')."""
    out = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return _after(out, residual, activation, multiplier)


def _after(out: Tensor, residual: Tensor | None, activation: str, multiplier: Tensor | None) -> Tensor:
    out = ACTIVATIONS[activation](out if residual is None else out + residual)
    return out if multiplier is None else out * multiplier


EAGER: Mapping[str, Callable[..., Tensor]] = {"runtime.linear": linear, "runtime.conv2d": conv2d}


def fuse_epilogues(program: Program) -> Program:
    """Fuse each linear and conv2d with the activation, residual addition or gate that alone uses it.

    ``program`` is static: equal specs make an addition a residual one.  The fused node takes the name and
    place of the last node it replaces.  New values (the gates of GEGLU) get a plain :class:`TensorSpec`.
    """
    program, gates = gates_of.opened(program)
    fuser = _Fuser(program)
    for node in program.nodes:
        fuser.node(node)
    out = without_dead(program.with_nodes(tuple(fuser.nodes.values())))[0]
    applied = tuple(Applied(k, c) for k, c in {"gated linear": gates, **fuser.counts}.items() if c)
    return replace(out, applied=(*program.applied, *applied))


class _Fuser:
    """Walks the nodes in order and grows the fused node behind each value."""

    def __init__(self, program: Program):
        self.program, self.users = program, program.users()
        self.nodes: dict[str, Node] = {}
        self.grown: dict[str, Node] = {}  # value -> the linear or conv2d that makes it, fused so far
        self.order = {o: i for i, n in enumerate(program.nodes) for o in n.outputs}
        self.counts: dict[str, int] = {}

    def node(self, node: Node) -> None:
        """Keep the node, or the fused one in its place."""
        if node.op in _FUSED or node.op in _OWN:
            self.grown[node.outputs[0]] = node
        fused = self._fused(node)
        if fused is not None:
            self.grown[node.outputs[0]] = fused
        self.nodes[node.name] = fused or node

    def _fused(self, node: Node) -> Node | None:
        activation = _activation(node)
        if activation is not None:
            source = self._growing(node, node.args.get("self", node.args.get("x")), "activation")
            return source and self._with(node, source, "activation in the product", activation=activation)
        if node.op == "aten.add.Tensor" and node.args["alpha"] == 1:
            return self._binary(node, "residual")
        if node.op == "aten.mul.Tensor":
            return self._binary(node, "multiplier")
        return None

    def _binary(self, node: Node, role: str) -> Node | None:
        """Fuse an addition or product into the operand that is free for it; of two, the one made later."""
        operands = [node.args["self"], node.args["other"]]
        if not all(isinstance(o, Ref) and self._same(o.name, node.outputs[0]) for o in operands):
            return None
        operands.sort(key=lambda o: self.order.get(o.name, -1))
        for mine, other in ((operands[1], operands[0]), (operands[0], operands[1])):
            source = self._growing(node, mine, role)
            if source is not None and mine != other:
                return self._with(node, source, f"{role} in the product", **{role: other})
        return None

    def _same(self, name: str, other: str) -> bool:
        a, b = spec_of(self.program, name), spec_of(self.program, other)
        return a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype

    def _growing(self, node: Node, value: Any, role: str) -> Node | None:
        """The product that makes ``value``, where ``node`` alone uses it and it can still fuse ``role``."""
        source = self.grown.get(value.name) if isinstance(value, Ref) else None
        if source is None or value.name in self.program.outputs or self.users[value.name] != [node]:
            return None
        free = (_FREE_OWN if source.op in _OWN else _FREE).get(role)
        used = [True] if free is None else [source.args.get(k) not in (None, "none") for k in free]
        return None if any(used) or not self._same(value.name, node.outputs[0]) else source

    def _with(self, node: Node, source: Node, rule: str, **more: Any) -> Node:
        """``source`` and ``node`` in one, in the place of ``node``."""
        self.counts[rule] = self.counts.get(rule, 0) + 1
        if source.op in _OWN:
            return replace(source, name=node.name, outputs=node.outputs, args={**source.args, **more})
        plain = {"residual": None, "activation": "none", "multiplier": None}
        head = {k: source.args[k] for k in ("input", "weight", "bias")}
        args = {**head, **plain, **{k: v for k, v in source.args.items() if k not in head}, **more}
        return replace(node, op=_FUSED.get(source.op, source.op), args=args, source=source.source)


def _activation(node: Node) -> str | None:
    if node.op in ("aten.silu.default", "aten.relu.default"):
        return node.op.split(".")[1]
    if node.op == "aten.gelu.default":
        return "gelu" if node.args["approximate"] == "none" else "gelu_tanh"
    if node.op == "fusegen.bias_act.default" and node.args["act"] == "quick_gelu":
        alone = node.args["bias"] is None and node.args["clamp"] is None and node.args["gain"] in (None, 1.0)
        return "quick_gelu" if alone else None
    return None


def merge_linears(program: Program, least: int = 2) -> Program:
    """Make linears of one input one linear, and views of its output: q, k and v; the projections of the time embedding.

    Groups of fewer than ``least`` stay.  The parts go unless something else uses them.
    """
    groups: dict[Any, list[Node]] = {}
    for node in program.nodes:
        keys = _MERGED.get(node.op, ())
        rows = [node.args[k] for k in keys[1:]]
        constant = rows and all(r is None or r.name in program.weights for r in rows)
        if constant and node.args.get("residual") is None and node.args.get("activation", "none") == "none":
            kinds = tuple(None if r is None else program.weights[r.name].dtype for r in rows)
            groups.setdefault((node.op, node.args[keys[0]], kinds), []).append(node)
    groups = {
        k: g for k, g in groups.items() if len(g) >= least and not any(n.outputs[0] in program.outputs for n in g)
    }
    if not groups:
        return program
    weights, specs, names = dict(program.weights), dict(program.specs), Names.of(program)
    new: dict[str, tuple[Node, ...]] = {}
    for group in groups.values():
        new |= {n.name: () for n in group} | {group[0].name: _merged(program, group, weights, specs, names)}
    nodes = tuple(n for node in program.nodes for n in new.get(node.name, (node,)))
    out = without_dead(replace(program, weights=weights, specs=specs).with_nodes(nodes))[0]
    merged = sum(len(g) for g in groups.values())
    return replace(out, applied=(*program.applied, Applied("linears of one input", merged)))


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def _merged(
    program: Program, group: list[Node], weights: dict[str, Weight], specs: dict[str, TensorSpec], names: Names
) -> tuple[Node, Node]:
    """The one linear of a group and the split of its output, whose outputs have the group's names."""
    args = dict(group[0].args)
    for k in _MERGED[group[0].op][1:]:
        if args[k] is not None:
            new = names.fresh(f"{args[k].name}.merged")
            weights[new], args[k] = Moved(_joined, *(program.weights[n.args[k].name] for n in group)), Ref(new)
    sizes = tuple(program.weights[n.args["weight"].name].shape[0] for n in group)
    name = names.fresh(f"{group[0].name}.merged")
    spec = spec_of(program, group[0].outputs[0])
    if spec is not None:
        specs[name] = TensorSpec((*spec.shape[:-1], sum(sizes)), spec.dtype)
    given = {"self": Ref(name), "split_sizes": sizes, "dim": -1}
    split = Node(
        names.fresh(f"{name}.split"),
        _SPLIT,
        complete(overload(_SPLIT), given, name),
        tuple(n.outputs[0] for n in group),
    )
    return replace(group[0], name=name, args=args, outputs=(name,)), split
