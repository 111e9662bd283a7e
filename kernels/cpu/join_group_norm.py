"""Launcher of join_group_norm.cpp."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusegen.kernels.cpu.group_norm import Args as Args
from fusegen.kernels.cpu.group_norm import dense_samples, fill, unfit
from fusegen.kernels.cpu.library import CpuLaunch
from fusegen.kernels.op import Kernel, is_last

ROLES = {"x": 0, "other": 1, "weight": 3, "bias": 4, "moments": 8}


def decline(*args: Any) -> str | None:
    x, other = args[:2]
    if x.numel() and not other.numel():
        return "other has no channels"
    alike = other.movedim(1, -1).is_contiguous() if is_last(x) else dense_samples(other)
    return unfit(x, ROLES, args) or (None if alike else "other is not laid out as x is")


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    y, joined = outs
    struct = fill(y, ROLES, args, args[2], args[5], args[6] == "silu")
    struct.joined, struct.other_batch, struct.concat = joined.data_ptr(), args[1].stride(0), args[7] == "concat"
    return CpuLaunch("join_group_norm", struct, {i: name for name, i in ROLES.items()}, outs, args)


KERNELS = [Kernel("join_group_norm C++", "cpu", decline, bind)]
