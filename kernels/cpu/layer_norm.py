"""Launcher of layer_norm.cpp."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusegen.kernels.cpu import row_norm
from fusegen.kernels.cpu.library import CpuLaunch
from fusegen.kernels.cpu.row_norm import Args as Args
from fusegen.kernels.op import Kernel

ROLES = {"x": 0, "weight": 1, "bias": 2, "scale": 4, "shift": 5}


def decline(*args: Any) -> str | None:
    return row_norm.decline(ROLES, args)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    return row_norm.bind("layer_norm", ROLES, outs, args, args[3])


KERNELS = [Kernel("layer_norm C++", "cpu", decline, bind)]
