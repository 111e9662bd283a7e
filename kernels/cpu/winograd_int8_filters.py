"""Launcher of winograd_int8_filters.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import CpuLaunch
from fusegen.kernels.op import Kernel


class Args(ctypes.Structure):
    """``fg_winograd_int8_filters_args`` of abi_images.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "filters", "out_scale")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    ]


def decline(weight: Tensor, scale: Tensor) -> str | None:
    if scale.dtype != torch.float32:
        return f"scale is {scale.dtype}"
    return None if weight.is_contiguous() and scale.is_contiguous() else "weight or scale are strided"


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    filters, scale = outs
    struct = Args(
        filters=filters.data_ptr(), out_scale=scale.data_ptr(), inputs=args[0].shape[1], outputs=args[0].shape[0]
    )
    return CpuLaunch("winograd_int8_filters", struct, {0: "weight", 1: "scale"}, outs, args)


KERNELS = [Kernel("winograd_int8_filters C++", "cpu", decline, bind)]
