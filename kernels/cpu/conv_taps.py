"""Launcher of conv_taps.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.op import Kernel


class Args(ctypes.Structure):
    """``fg_conv_taps_args`` of abi_images.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "inputs", "outputs", "doubled")),
    ]


def decline(weight: Tensor, doubled: bool) -> str | None:
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"weight is {weight.dtype}"
    return None if weight.is_contiguous() else "weight is strided"


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    weight, doubled = args
    outputs, inputs = weight.shape[:2]
    struct = Args(
        out=outs[0].data_ptr(), dtype=DTYPES[weight.dtype], inputs=inputs, outputs=outputs, doubled=doubled
    )  # fmt: skip
    return CpuLaunch("conv_taps", struct, {0: "weight"}, outs, args)


KERNELS = [Kernel("conv_taps C++", "cpu", decline, bind)]
