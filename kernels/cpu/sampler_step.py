"""Launcher of sampler_step.cpp."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.cpu.noise_normal import COLUMNS
from fusegen.kernels.op import FLOATS, Kernel

_POINTERS = ("x", "out", "row", "history", "seeds", "guidance")


class Args(ctypes.Structure):
    """``fg_sampler_step_args`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_POINTERS, "table", "next", "input", "denoised")),
        *((name, ctypes.c_int64) for name in ("dtype", "batch", "count", "guided")),
        ("rescale", ctypes.c_double),
    ]


def decline(
    x: Tensor, out: Tensor, row: Tensor, history: Tensor, seeds: Tensor, guidance: Tensor, rescale: float
) -> str | None:
    for name, tensor in (("x", x), ("row", row), ("history", history), ("guidance", guidance)):
        if tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}, not float32"
    if out.dtype not in FLOATS:
        return f"out is {out.dtype}"
    for name, tensor in zip(_POINTERS, (x, out, row, history, seeds, guidance), strict=True):
        if not tensor.is_contiguous():
            return f"{name} is not contiguous"
    return None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, out, rescale = args[0], args[1], args[6]
    struct = Args(
        table=COLUMNS.ctypes.data,
        next=outs[0].data_ptr(),
        input=outs[1].data_ptr(),
        denoised=outs[2].data_ptr(),
        dtype=DTYPES[out.dtype],
        batch=x.shape[0],
        count=math.prod(x.shape[1:]),
        guided=out.shape[0] != x.shape[0],
        rescale=rescale,
    )
    return CpuLaunch("sampler_step", struct, dict(enumerate(_POINTERS)), outs, args)


KERNELS = [Kernel("sampler_step C++", "cpu", decline, bind)]
