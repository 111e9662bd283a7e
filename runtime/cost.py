"""What a node must do at the least: floating-point operations, and bytes read or written once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fusegen.kernels.op import Cost
from fusegen.runtime.program import Node


def nbytes(value: Any) -> int:
    """Bytes of the tensors in an argument value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, tuple):
        return sum(nbytes(v) for v in value)
    return 0


def cost(node: Node, metas: Mapping[str, Any], outs: Sequence[Tensor]) -> Cost:
    """The cost of a node that is no view; ``metas``: its arguments, ``outs``: its outputs, all on ``meta``."""
    moved = sum(nbytes(v) for v in metas.values()) + sum(nbytes(o) for o in outs)
    return Cost(_flops(node.op.split(".")[1], metas, outs), moved)


def _flops(base: str, metas: Mapping[str, Any], outs: Sequence[Tensor]) -> int:
    elements = sum(o.numel() for o in outs)
    weight = metas.get("weight")
    if base == "linear":
        return 2 * elements * int(metas["input"].shape[-1])
    if base.startswith("conv") and isinstance(weight, Tensor):
        taps = math.prod(weight.shape[1:])
        made = metas["input"].numel() // metas["input"].shape[1] * weight.shape[0] if "transpose" in base else elements
        return 2 * made * taps
    if base in ("matmul", "mm", "bmm"):
        return 2 * elements * int(metas["self"].shape[-1])
    if base in ("addmm", "baddbmm"):
        return 2 * elements * int(metas["mat1" if base == "addmm" else "batch1"].shape[-1])
    if base == "scaled_dot_product_attention":
        return 2 * elements * int(metas["key"].shape[-2]) + 2 * metas["query"].numel() * int(metas["key"].shape[-2])
    return elements
