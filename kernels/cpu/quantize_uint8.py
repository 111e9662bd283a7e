"""Launcher of quantize_uint8.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.op import FLOATS, Kernel


class Args(ctypes.Structure):
    """``fg_quantize_uint8_args`` of abi.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "codes", "scale", "zero")] + [
        (name, ctypes.c_int64) for name in ("dtype", "batch", "elements")
    ]


def decline(x: Tensor) -> str | None:
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is not channels-last"
    return None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    (x,) = args
    codes, scale, zero = (t.data_ptr() for t in outs)
    struct = Args(
        codes=codes, scale=scale, zero=zero, dtype=DTYPES[x.dtype], batch=x.shape[0], elements=x.shape[1:].numel()
    )
    return CpuLaunch("quantize_uint8", struct, {0: "x"}, outs, args)


KERNELS = [Kernel("quantize_uint8 C++", "cpu", decline, bind)]
