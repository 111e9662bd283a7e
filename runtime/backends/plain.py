"""The nodes of lowered programs as plain PyTorch calls, and the memory order of what they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusegen.runtime import specialize
from fusegen.runtime.backends.binding import Call
from fusegen.runtime.program import Node, Program
from fusegen.runtime.rewrite.epilogue import EAGER


def linear(**values: Any) -> Tensor:
    """``runtime.linear``, contiguous."""
    return EAGER["runtime.linear"](**values).contiguous()


def conv2d(**values: Any) -> Tensor:
    """``runtime.conv2d``, channels-last; of single pixels as a product of matrices, whose library adds the bias too."""
    x, weight = values["input"], values["weight"]
    plain = tuple(values["stride"]) == (1, 1) and not any(values["padding"]) and values["groups"] == 1
    if plain and weight.shape[2:] == (1, 1) and x.is_contiguous(memory_format=torch.channels_last):
        after = {k: None if values[k] is None else values[k].permute(0, 2, 3, 1) for k in ("residual", "multiplier")}
        rows, own = x.permute(0, 2, 3, 1), {k: values[k] for k in ("bias", "activation")}
        made = EAGER["runtime.linear"](input=rows, weight=weight.flatten(1), **own, **after)
        return made.contiguous().permute(0, 3, 1, 2)
    return EAGER["runtime.conv2d"](**values).contiguous(memory_format=torch.channels_last)


CALLS: Mapping[str, Callable[..., Tensor]] = {"runtime.linear": linear, "runtime.conv2d": conv2d}
specialize.SHAPES.update(CALLS)


def call(node: Node) -> Call:
    """The plain call of a node that is in :data:`CALLS`."""
    names = tuple(node.args)
    return Call(partial(_named, CALLS[node.op], names), tuple(node.args.values()), names)


def _named(function: Callable[..., Tensor], names: tuple[str, ...], *args: Any) -> Tensor:
    return function(**dict(zip(names, args, strict=True)))


def convolutions(program: Program) -> Program:
    """Every ``aten.conv2d`` as a ``runtime.conv2d``, so that its output is known to be channels-last."""
    names = ("input", "weight", "bias")
    empty = {"residual": None, "activation": "none", "multiplier": None}
    nodes = []
    for node in program.nodes:
        if node.op == "aten.conv2d.default":
            head = {k: node.args[k] for k in names}
            node = replace(node, op="runtime.conv2d", args={**head, **empty, **node.args})
        nodes.append(node)
    return replace(program, nodes=tuple(nodes))
