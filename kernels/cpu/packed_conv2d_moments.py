"""Launcher of packed_conv2d_moments.cpp."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusegen.kernels.cpu.library import CpuLaunch
from fusegen.kernels.cpu.packed_conv2d import Args as Args
from fusegen.kernels.cpu.packed_conv2d import decline, launch
from fusegen.kernels.op import Kernel


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    return launch("packed_conv2d_moments", outs, args)


KERNELS = [Kernel("packed_conv2d_moments C++", "cpu", decline, bind)]
