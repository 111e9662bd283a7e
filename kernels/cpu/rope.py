"""Launcher of rope.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from fusegen.kernels.cpu import rotate
from fusegen.kernels.cpu.library import CpuLaunch
from fusegen.kernels.op import Kernel
from fusegen.kernels.rope import check


class Args(ctypes.Structure):
    """``fg_rope_args`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "positions", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "table_dtype", "positions_dtype")),
        *rotate.ROTATION,
    ]


def decline(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, rotary_dim: int | None
) -> str | None:
    check("rope", x, cos, sin, positions, rotary_dim)
    return rotate.decline(x, cos, sin, positions, interleaved, rotary_dim)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, cos, _, positions, interleaved, rotary_dim = args
    values = rotate.rotation(x, outs[0], cos, positions, interleaved, rotary_dim) or {}
    struct = Args(out=outs[0].data_ptr(), **rotate.dtypes(x, cos, positions), **values)
    return CpuLaunch("rope", struct, {0: "x", 1: "cos", 2: "sin", 3: "positions"}, outs, args)


KERNELS = [Kernel("rope C++", "cpu", decline, bind)]
