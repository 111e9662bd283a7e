"""Launcher of packed_linear.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import CpuLaunch
from fusegen.kernels.cpu.quantized import fields, unserved
from fusegen.kernels.op import Kernel

PLACE = ("outer", "inner", "width", "x_outer", "x_inner", "out_features", "activation")


class Args(ctypes.Structure):
    """``fg_packed_linear_args`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "panels", "bias", "residual", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "bias_dtype", *PLACE)),
    ]


def decline(x: Tensor, panels: Tensor, outputs: int, bias: Any, residual: Any, activation: str) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"x is {x.dtype}, neither torch.float32 nor torch.bfloat16"
    if (panels.shape[-1] == 1) != (x.dtype == torch.float32):
        return f"x is {x.dtype}, the panels are in {'columns' if panels.shape[-1] == 1 else 'pairs'}"
    return unserved(x, bias, residual, panels=panels)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, _, outputs, bias, _, activation = args
    struct = Args(out_features=outputs, **fields(x, outs[0], bias, activation))
    return CpuLaunch("packed_linear", struct, {0: "x", 1: "panels", 3: "bias", 4: "residual"}, outs, args)


KERNELS = [Kernel("packed_linear C++", "cpu", decline, bind)]
