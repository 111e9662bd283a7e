"""Launcher of packed_linear_int8.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import CpuLaunch
from fusegen.kernels.cpu.packed_linear import PLACE
from fusegen.kernels.cpu.quantized import fields, unserved
from fusegen.kernels.op import Kernel

_POINTERS = {0: "x", 1: "panels", 2: "scale", 4: "bias", 5: "residual"}


class Args(ctypes.Structure):
    """``fg_packed_linear_int8_args`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_POINTERS.values(), "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "bias_dtype", *PLACE)),
    ]


def decline(
    x: Tensor, panels: Tensor, scale: Tensor, outputs: int, bias: Any, residual: Any, activation: str
) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"x is {x.dtype}"
    if scale.dtype != torch.float32:
        return f"scale is {scale.dtype}"
    return unserved(x, bias, residual, panels=panels, scale=scale)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, _, _, outputs, bias, _, activation = args
    struct = Args(out_features=outputs, **fields(x, outs[0], bias, activation))
    return CpuLaunch("packed_linear_int8", struct, _POINTERS, outs, args)


KERNELS = [Kernel("packed_linear_int8 C++", "cpu", decline, bind)]
