"""Launcher of add_norm.cpp."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusegen.kernels.cpu import row_norm
from fusegen.kernels.cpu.library import CpuLaunch
from fusegen.kernels.cpu.row_norm import Args as Args
from fusegen.kernels.op import Kernel

ROLES = {"x": 0, "branch": 1, "gate": 2, "weight": 3, "bias": 4, "scale": 5, "shift": 6}


def decline(*args: Any) -> str | None:
    return row_norm.decline(ROLES, args)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    return row_norm.bind("add_norm", ROLES, outs, args, args[7], args[9], args[8] == "rms")


KERNELS = [Kernel("add_norm C++", "cpu", decline, bind)]
