"""Calls of ATen operators, as functions that return or that write into a given output."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fusegen.runtime.backends.binding import Call
from fusegen.runtime.program import Node
from fusegen.runtime.rewrite.graph import overload
from fusegen.runtime.specialize import arrange

_DISPATCH = {"cpu": "CPU", "cuda": "CUDA"}


@functools.lru_cache(maxsize=1024)
def _out(op: str, device: str) -> Any:
    """The overload of ``op`` that writes into ``out`` and takes the same arguments otherwise, where one is native.

    An overload that PyTorch derived from the functional one would allocate and copy, and is of no use.
    """
    handle = overload(op)
    if handle.namespace != "aten" or len(handle._schema.returns) != 1:
        return None
    packet = getattr(torch.ops.aten, handle._opname)
    want = [(a.name, str(a.type)) for a in handle._schema.arguments]
    for name in packet.overloads():
        if "out" not in name:
            continue
        other = getattr(packet, name)
        given = [(a.name, str(a.type)) for a in other._schema.arguments if a.alias_info is None]
        outs = [a.name for a in other._schema.arguments if a.alias_info is not None]
        native = torch._C._dispatch_has_kernel_for_dispatch_key(other.name(), _DISPATCH[device])
        if given == want and outs == ["out"] and native:
            return other
    return None


def has_out(op: str, device: str) -> bool:
    """Whether ``op`` can write into a planned buffer."""
    return _out(op, device) is not None


def call(node: Node, planned: bool, device: torch.device) -> Call:
    """The call of an ATen node; ``planned``: its function takes ``out=``."""
    handle = _out(node.op, device.type) if planned else overload(node.op)
    values = {k: _plain(v, device) for k, v in node.args.items()}
    args, kwargs = arrange(handle, values)
    return Call(handle._op, tuple(args), tuple(k for k in values if k not in kwargs), kwargs)


def _plain(value: Any, device: torch.device) -> Any:
    """Devices become this one: the graph names the device it was exported on."""
    return device if isinstance(value, torch.device) else value
