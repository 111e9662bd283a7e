"""Launcher of winograd_filters.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.op import Kernel


class Args(ctypes.Structure):
    """``fg_winograd_filters_args`` of abi_images.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "inputs", "outputs", "transposed")),
    ]


def decline(weight: Tensor, transposed: bool) -> str | None:
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"weight is {weight.dtype}"
    return None if weight.is_contiguous() else "weight is strided"


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    weight, transposed = args
    struct = Args(
        out=outs[0].data_ptr(), dtype=DTYPES[weight.dtype], outputs=weight.shape[0], inputs=weight.shape[1],
        transposed=transposed,
    )  # fmt: skip
    return CpuLaunch("winograd_filters", struct, {0: "weight"}, outs, args)


KERNELS = [Kernel("winograd_filters C++", "cpu", decline, bind)]
