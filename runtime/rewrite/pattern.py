"""A traced spelling: what to look for in a Program, and its JSON form.

A :class:`Pattern` is a small program whose arguments may also be wildcards (a :class:`Ref` to one of its wildcards),
literals (:class:`Literal`, any plain value) and :data:`HALF` (float16 or bfloat16, the same one everywhere).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fusegen.runtime.program import Node, Ref

# Flags that choose between implementations of one meaning, and that exporters set differently.
IGNORED = frozenset(
    {
        ("aten.group_norm.default", "cudnn_enabled"),
        ("aten.layer_norm.default", "cudnn_enable"),
        ("aten.to.dtype", "non_blocking"),
        ("aten.to.dtype", "copy"),
        ("aten.to.dtype", "memory_format"),
    }
)
# Arguments that are dimensions: compared counted from the end.
DIMS: Mapping[str, tuple[str, ...]] = {
    "aten.transpose.int": ("dim0", "dim1"),
    "aten.softmax.int": ("dim",),
    "aten._softmax.default": ("dim",),
    "aten.mean.dim": ("dim",),
    "aten.sum.dim_IntList": ("dim",),
    "aten.var.dim": ("dim",),
    "aten.var.correction": ("dim",),
    "aten.chunk.default": ("dim",),
    "aten.split.Tensor": ("dim",),
    "aten.cat.default": ("dim",),
    "aten.flatten.using_ints": ("start_dim", "end_dim"),
    "aten.glu.default": ("dim",),
    "aten.slice.Tensor": ("dim",),
    "aten.slice_scatter.default": ("dim",),
    "aten.unbind.int": ("dim",),
}
# Two arguments that may change places.
SWAPS: Mapping[str, tuple[str, str]] = {
    "aten.add.Tensor": ("self", "other"),
    "aten.mul.Tensor": ("self", "other"),
    "aten.transpose.int": ("dim0", "dim1"),
}
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Literal:
    """Matches any plain value, and hands it to the spelling's ``call`` under this name."""

    name: str


@dataclass(frozen=True)
class Half:
    """Matches float16 or bfloat16."""


HALF = Half()


@dataclass(frozen=True)
class Pattern:
    """One traced form of the spelling ``spelling`` of the op ``op``; ``output`` is the value that is replaced.

    ``half`` marks the form traced in half precision, whose casts are real.
    """

    op: str
    spelling: str
    half: bool
    wildcards: tuple[str, ...]
    nodes: tuple[Node, ...]
    output: str

    @property
    def rule(self) -> str:
        """Its name in :class:`~fusegen.runtime.program.Applied`."""
        return f"{self.op.split('.')[1]}: {self.spelling}"


def from_end(op: str, name: str, value: Any, rank: int | None) -> Any:
    """``value`` of argument ``name``; a dimension is counted from the end (-1 is the last) where ``rank`` is known."""
    if rank is None or name not in DIMS.get(op, ()):
        return value
    if isinstance(value, tuple):
        return tuple(from_end(op, name, v, rank) for v in value)
    return value - rank if isinstance(value, int) and value >= 0 else value


_NAMED: Mapping[str, tuple[Any, ...]] = {
    "dtype": (
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.uint8,
    ),
    "memory_format": (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d),
    "layout": (torch.strided,),
}


def encode(value: Any) -> Any:
    """An argument value as JSON."""
    if isinstance(value, tuple):
        return [encode(v) for v in value]
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, Literal):
        return {"literal": value.name}
    if isinstance(value, Half):
        return {"half": True}
    if (isinstance(value, float) and value != value) or value in (float("inf"), float("-inf")):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, members in _NAMED.items():
        if value in members and isinstance(value, type(members[0])):
            return {kind: str(value).removeprefix("torch.")}
    raise TypeError(f"a pattern cannot hold {value!r}")


def decode(value: Any) -> Any:
    """The argument value of :func:`encode`'s JSON."""
    if isinstance(value, list):
        return tuple(decode(v) for v in value)
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind in _NAMED:
        return getattr(torch, inner)
    makers = {"ref": Ref, "literal": Literal, "half": lambda _: HALF, "float": float, "device": torch.device}
    return makers[kind](inner)


def to_json(pattern: Pattern) -> dict[str, Any]:
    """The pattern as JSON."""
    nodes = [
        {"op": n.op, "args": {k: encode(v) for k, v in n.args.items()}, "outputs": list(n.outputs)}
        for n in pattern.nodes
    ]
    return {
        "spelling": pattern.spelling,
        "half": pattern.half,
        "wildcards": list(pattern.wildcards),
        "nodes": nodes,
        "output": pattern.output,
    }


def from_json(op: str, document: Mapping[str, Any]) -> Pattern:
    """The pattern of :func:`to_json`'s JSON."""
    nodes = tuple(
        Node(n["outputs"][0], n["op"], {k: decode(v) for k, v in n["args"].items()}, tuple(n["outputs"]))
        for n in document["nodes"]
    )
    wildcards = tuple(document["wildcards"])
    return Pattern(op, document["spelling"], document["half"], wildcards, nodes, document["output"])


def is_half(value: Any) -> bool:
    """Whether a value in a graph is a half-precision dtype."""
    return value in _HALVES if isinstance(value, torch.dtype) else False
