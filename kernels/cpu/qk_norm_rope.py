"""Launcher of qk_norm_rope.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from fusegen.kernels.cpu import rotate
from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.op import FLOATS, Kernel
from fusegen.kernels.qk_norm_rope import check_all, seen


class Args(ctypes.Structure):
    """``fg_qk_norm_rope_args`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "cos", "sin", "positions", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "weight_dtype", "table_dtype", "positions_dtype")),
        *rotate.ROTATION,
        ("eps", ctypes.c_double),
    ]


def decline(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, eps: float,
    interleaved: bool, rotary_dim: int | None, transpose: bool,
) -> str | None:  # fmt: skip
    check_all(x, weight, cos, sin, positions, rotary_dim, transpose)
    if weight is not None and (weight.dtype not in FLOATS or not weight.is_contiguous()):
        return f"weight is {weight.dtype} of stride {weight.stride(0)}"
    return rotate.decline(seen(x, transpose), cos, sin, positions, interleaved, rotary_dim)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, weight, cos, _, positions, eps, interleaved, rotary_dim, transpose = args
    values = rotate.rotation(seen(x, transpose), outs[0], cos, positions, interleaved, rotary_dim) or {}
    own = 0 if weight is None else DTYPES[weight.dtype]
    struct = Args(
        out=outs[0].data_ptr(), weight_dtype=own, eps=eps, **rotate.dtypes(x, cos, positions), **values
    )  # fmt: skip
    return CpuLaunch("qk_norm_rope", struct, {0: "x", 1: "weight", 2: "cos", 3: "sin", 4: "positions"}, outs, args)


KERNELS = [Kernel("qk_norm_rope C++", "cpu", decline, bind)]
