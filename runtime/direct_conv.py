"""3x3 convolutions in bfloat16 by taps that a session packs, where the plan finds a kernel.

They are what :mod:`.winograd` leaves, and those of stride 2; :mod:`.upsample` has those behind an upsampling.  Where a
CPU multiplies tiles, the nine products of a pixel take less time than the transforms that would save some.  As there,
this is done once sizes and strides are known.  The taps depend on the weight alone: a session makes them once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fusegen.kernels import op as registry
from fusegen.kernels.op import Op
from fusegen.runtime.program import Applied, Node, Program, Ref
from fusegen.runtime.rewrite.graph import Names, without_dead
from fusegen.runtime.specialize import propagate, spec_of

FEW = 32  # inputs or outputs below which much of a product is padding: outputs lie in groups of so many
RULE = "3x3 convolution by packed taps"
_PLAIN = {"padding": (1, 1), "dilation": (1, 1), "groups": 1, "activation": "none", "multiplier": None}
_STRIDES = ((1, 1), (2, 2))
Declined = Callable[[Op, tuple[Any, ...]], str | None]


def folded(program: Program, declined: Declined, reason: str | None) -> Program:
    """The static ``program``, lowered and its strides known, with ``packed_conv2d`` in the place of each convolution
    that a kernel takes.  ``declined(op, args)``: why none does, or None; ``reason``: why the backend has other kernels
    for them all.
    """
    if not registry.get("packed_conv2d").kernels:
        return program
    fit = [n for n in program.nodes if _fits(n, program)]
    if not fit or reason is not None:
        none = (Applied(RULE, 0, (f"{len(fit)} convolutions: {reason}",)),) if fit else ()
        return replace(program, applied=(*program.applied, *none))
    stays = {n.name: _stays(n, program, declined) for n in fit}
    names, taps, nodes = Names.of(program), dict[str, str](), list[Node]()  # taps: of each weight
    for node in program.nodes:
        if stays.get(node.name, "it does not fit") is not None:
            nodes.append(node)
            continue
        weight = node.args["weight"]
        if weight.name not in taps:
            made = taps[weight.name] = names.fresh(f"{weight.name}.taps")
            nodes.append(Node(made, "fusegen.conv_taps.default", {"weight": weight, "doubled": False}, (made,)))
        args = {"x": node.args["input"], "taps": Ref(taps[weight.name]), **_rest(node, program)}
        nodes.append(replace(node, op="fusegen.packed_conv2d.default", args=args))
    left = tuple(f"{name}: {why}" for name, why in stays.items() if why is not None)
    applied = Applied(RULE, len(fit) - len(left), left)
    program = replace(program, nodes=tuple(nodes), applied=(*program.applied, applied))
    return propagate(without_dead(program)[0]) if applied.count else program


def _fits(node: Node, program: Program) -> bool:
    """Whether it is a plain 3x3 convolution of enough channels by a weight of the program, all of it in bfloat16."""
    given = node.args["weight"] if node.op == "runtime.conv2d" else None
    weight = program.weights.get(given.name) if isinstance(given, Ref) else None
    if weight is None or tuple(weight.shape[2:]) != (3, 3) or min(weight.shape[:2]) < FEW:
        return False
    half = weight.dtype == spec_of(program, node.args["input"].name).dtype == torch.bfloat16
    return half and node.args["stride"] in _STRIDES and all(node.args[k] == v for k, v in _PLAIN.items())


def _rest(node: Node, program: Program) -> dict[str, Any]:
    """The op's arguments behind x and the taps."""
    outputs = int(program.weights[node.args["weight"].name].shape[0])
    given = {k: node.args[k] for k in ("bias", "residual")}
    return {"outputs": outputs, **given, "stride": node.args["stride"][0], "doubled": False}


def _stays(node: Node, program: Program, declined: Declined) -> str | None:
    """Why no kernel takes it, or None."""

    def meta(value: Any) -> Any:
        return spec_of(program, value.name).meta() if isinstance(value, Ref) else value

    (taps,) = registry.get("conv_taps").allocate(meta(node.args["weight"]))
    rest = (meta(v) for v in _rest(node, program).values())
    return declined(registry.get("packed_conv2d"), (meta(node.args["input"]), taps, *rest))
