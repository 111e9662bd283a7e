"""StyleGAN2's layers by Winograd's algorithm, where the plan finds a kernel that takes them.

As in :mod:`.winograd`, it is done once sizes and strides are known, and what depends on the weights alone is worked out
once a session.  A transposed layer takes the filter, the noise and the activation that follow it along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op, is_channels_last
from fusegen.runtime.program import Applied, Node, Program, Ref
from fusegen.runtime.rewrite.graph import Names, without_dead
from fusegen.runtime.specialize import propagate, spec_of
from fusegen.runtime.winograd import FEW

RULE = "modulated convolution by Winograd's algorithm"
_OP = "winograd_modulated_conv2d"
_BARE = {"noise": None, "bias": None, "act": "linear", "gain": None, "clamp": None}
_FILTERED = {"up": (1, 1), "down": (1, 1), "padding": (1, 1, 1, 1), "flip_filter": True, "gain": 1.0}
_ABSENT = {"taps": None, "noise": None, "bias": None, "act": "linear", "alpha": None, "gain": None, "clamp": None}
_KINDS = ("conv_taps", "winograd_filters")  # the first for bfloat16 alone
_FINISH = ("bias", "act", "alpha", "gain", "clamp")


@dataclass(frozen=True)
class _Layer:
    """A layer that starts with the modulated convolution ``first``; its value is that of ``last``.  ``more``: what the
    nodes between give to the op."""

    first: Node
    last: Node
    more: Mapping[str, Any]


def folded(program: Program, declined: Callable[[Op, tuple[Any, ...]], str | None]) -> Program:
    """The static ``program``, lowered and its strides known, with ``winograd_modulated_conv2d`` in the place of each
    layer that a kernel takes.  ``declined(op, args)``: why none does, or None.
    """
    if not registry.get(_OP).kernels:
        return program
    layers = {layer.last.name: layer for layer in _layers(program)}
    edit, left, count = _Edit(program), list[str](), 0
    for node in program.nodes:
        layer = layers.get(node.name)
        kind, reason = ("", "") if layer is None else _kind(layer, program, declined)
        if layer is None or not kind:
            left += [f"{node.name}: {reason}"] if reason else []
            edit.nodes.append(node)
        else:
            count += 1
            edit.replace(layer, kind)
    if count or left:
        program = replace(program, applied=(*program.applied, Applied(RULE, count, tuple(left))))
    if not count:
        return program
    program = propagate(without_dead(replace(program, nodes=tuple(edit.nodes)))[0])
    return edit.without_useless_copies(program)


def _layers(program: Program) -> list[_Layer]:
    """The 3x3 layers of enough channels, by weights of the program."""
    users = program.users()
    found = (_layer(n, program, users) for n in program.nodes if n.op == "fusegen.modulated_conv2d.default")
    return [layer for layer in found if layer is not None]


def _layer(node: Node, program: Program, users: Mapping[str, Any]) -> _Layer | None:
    weight, a = node.args["weight"], node.args
    fits = (
        isinstance(weight, Ref)
        and weight.name in program.weights
        and tuple(program.weights[weight.name].shape[2:]) == (3, 3)
        and program.weights[weight.name].shape[1] >= FEW
        and a["demodulate"]
    )
    if not fits:
        return None
    if a["up"] == 1:
        more = {k: a[k] for k in ("noise", *_FINISH)}
        return _Layer(node, node, more) if _is(a, padding=(1, 1)) else None
    if a["up"] != 2 or not _is(a, padding=(0, 0), **_BARE):
        return None
    return _transposed(node, program, users)


def _transposed(node: Node, program: Program, users: Mapping[str, Any]) -> _Layer | None:
    """The layer of a bare transposed convolution: its filter, then noise and bias_act where they are there."""
    last = _only_user(node, program, users)
    if last is None or last.op != "fusegen.upfirdn2d.default" or not _is(last.args, **_FILTERED):
        return None
    taps = last.args["filter"]
    if taps is None or spec_of(program, taps.name).sizes != (4, 4):
        return None
    more: dict[str, Any] = {"taps": taps, **_BARE}
    after = _only_user(last, program, users)
    if after is not None and after.op == "aten.add.Tensor" and after.args["alpha"] == 1:
        noise = next((v for v in (after.args["self"], after.args["other"]) if v != Ref(last.outputs[0])), None)
        sizes = spec_of(program, last.outputs[0]).sizes
        if isinstance(noise, Ref) and spec_of(program, noise.name).sizes in ((n, 1, *sizes[2:]) for n in (1, sizes[0])):
            more["noise"], last = noise, after
            after = _only_user(last, program, users)
    if after is not None and after.op == "fusegen.bias_act.default" and after.args["dim"] == 1:
        more |= {k: after.args[k] for k in _FINISH}
        last = after
    return _Layer(node, last, more)


def _is(args: Mapping[str, Any], **wanted: Any) -> bool:
    """Whether the arguments are as wanted; one number stands for a pair of it, as it does in a schema."""
    return all(args[k] == v or (isinstance(v, tuple) and args[k] == v[0]) for k, v in wanted.items())


def _only_user(node: Node, program: Program, users: Mapping[str, Any]) -> Node | None:
    (name,) = node.outputs
    using = users.get(name, [])
    return using[0] if name not in program.outputs and len(using) == 1 else None


def _kind(layer: _Layer, program: Program, declined: Callable[..., str | None]) -> tuple[str, str]:
    """The op that makes the filters which a kernel takes the layer with, or an empty text and why there is none."""
    metas = {k: v if not isinstance(v, Ref) else spec_of(program, v.name).meta() for k, v in layer.more.items()}
    x, weight, styles = (spec_of(program, layer.first.args[k].name).meta() for k in ("x", "weight", "styles"))
    reason = ""
    for kind in _KINDS if weight.dtype == torch.bfloat16 else _KINDS[1:]:
        (filters,) = registry.get(kind).allocate(weight)
        args = {
            "x": x.contiguous(memory_format=torch.channels_last), "filters": filters,
            "squares": torch.empty(weight.shape[:2], device="meta"), "styles": styles, "outputs": int(weight.shape[0]),
        }  # fmt: skip
        args |= _ABSENT | metas | {"eps": layer.first.args["eps"]}
        reason = declined(registry.get(_OP), tuple(args.values())) or ""
        if not reason:
            return kind, ""
    return "", reason


class _Edit:
    """The nodes of the new program; what depends on a weight alone stands once."""

    def __init__(self, program: Program):
        self.program, self.names, self.nodes = program, Names.of(program), list[Node]()
        self.made: dict[tuple[str, bool, str], tuple[Ref, Ref]] = {}
        self.copies: dict[str, Ref] = {}  # values -> the same channels-last

    def replace(self, layer: _Layer, kind: str) -> None:
        """Put the op, with filters of that kind, in the place of the layer's last node; the others are dead where
        nobody else uses them."""
        args, weight = layer.first.args, layer.first.args["weight"]
        x = args["x"].name
        if x not in self.copies:
            form = {"memory_format": torch.channels_last}
            self.copies[x] = self._node(f"{x}.channels_last", "aten.clone.default", {"self": args["x"], **form})
        filters, squares = self._of_weight(weight, "taps" in layer.more, kind)
        given = {"x": self.copies[x], "filters": filters, "squares": squares, "styles": args["styles"]}
        given |= {
            "outputs": int(self.program.weights[weight.name].shape[0]),
            **_ABSENT,
            **layer.more,
            "eps": args["eps"],
        }
        self.nodes.append(replace(layer.last, op=f"fusegen.{_OP}.default", args=given))

    def _node(self, base: str, op: str, args: Mapping[str, Any]) -> Ref:
        name = self.names.fresh(base)
        self.nodes.append(Node(name, op, args, (name,)))
        return Ref(name)

    def _of_weight(self, weight: Ref, transposed: bool, kind: str) -> tuple[Ref, Ref]:
        """The filters, and the sum of each pair of channels' squared weights, float32."""
        name, key = weight.name, (weight.name, transposed, kind)
        if key not in self.made:
            given = {
                "weight": weight,
                **({"transposed": transposed} if kind == "winograd_filters" else {"doubled": False}),
            }
            filters = self._node(f"{name}.winograd", f"fusegen.{kind}.default", given)
            kept = {"non_blocking": False, "copy": False, "memory_format": None}
            wide = self._node(f"{name}.wide", "aten.to.dtype", {"self": weight, "dtype": torch.float32, **kept})
            squared = self._node(f"{name}.squared", "aten.square.default", {"self": wide})
            summed = {"self": squared, "dim": (2, 3), "keepdim": False, "dtype": None}
            self.made[key] = filters, self._node(f"{name}.squares", "aten.sum.dim_IntList", summed)
        return self.made[key]

    def without_useless_copies(self, program: Program) -> Program:
        """``program``, its strides known, without the copies of what is channels-last as it is made."""
        copies = {copy.name: name for name, copy in self.copies.items()}
        same = {c: Ref(n) for c, n in copies.items() if is_channels_last(spec_of(program, n).meta())}
        nodes = [
            replace(n, args={k: same.get(v.name, v) if isinstance(v, Ref) else v for k, v in n.args.items()})
            for n in program.nodes
            if n.name not in same
        ]
        return propagate(replace(program, nodes=tuple(nodes))) if same else program
