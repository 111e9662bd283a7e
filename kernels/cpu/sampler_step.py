"""Launcher of sampler_step.cpp."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels import sampler_step as spec
from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.cpu.noise_normal import COLUMNS
from fusegen.kernels.op import FLOATS, Kernel

_POINTERS = {0: "x", 1: "out", 2: "row", 3: "history", 4: "seeds", 5: "guidance", 8: "mask", 9: "known"}  # by position


class Args(ctypes.Structure):
    """``fg_sampler_step_args`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_POINTERS.values(), "table", "next", "input", "denoised")),
        *((name, ctypes.c_int64) for name in ("dtype", "batch", "count", "guided", "thresholded", "rank")),
        *((name, ctypes.c_double) for name in ("rescale", "part")),
    ]


def decline(*args: Any) -> str | None:
    for index, name in _POINTERS.items():
        tensor = args[index]
        if tensor is None:
            continue
        if name == "out" and tensor.dtype not in FLOATS:
            return f"out is {tensor.dtype}"
        if name not in ("out", "seeds") and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}, not float32"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous"
    return None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, out, rescale, threshold = args[0], args[1], args[6], args[7]
    count = math.prod(x.shape[1:])
    rank, part = spec.rank(threshold, count)
    struct = Args(
        table=COLUMNS.ctypes.data,
        next=outs[0].data_ptr(),
        input=outs[1].data_ptr(),
        denoised=outs[2].data_ptr(),
        dtype=DTYPES[out.dtype],
        batch=x.shape[0],
        count=count,
        guided=out.shape[0] != x.shape[0],
        thresholded=threshold != 0,
        rank=rank,
        rescale=rescale,
        part=part,
    )
    return CpuLaunch("sampler_step", struct, _POINTERS, outs, args)


KERNELS = [Kernel("sampler_step C++", "cpu", decline, bind)]
