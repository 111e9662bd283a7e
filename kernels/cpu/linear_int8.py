"""Launcher of linear_int8.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import CpuLaunch
from fusegen.kernels.cpu.quantized import fields, unserved
from fusegen.kernels.op import Kernel

_POINTERS = ("x", "weight", "scale", "bias", "residual", "out")
_INTEGERS = (
    "dtype", "bias_dtype", "outer", "inner", "width", "x_outer", "x_inner", "out_features", "activation",
)  # fmt: skip


class Args(ctypes.Structure):
    """``fg_linear_int8_args`` of abi.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_int64) for name in _INTEGERS]


def decline(x: Tensor, weight: Tensor, scale: Tensor, bias: Any, residual: Any, activation: str) -> str | None:
    if scale.dtype != torch.float32:
        return f"scale is {scale.dtype}"
    return unserved(x, bias, residual, weight=weight, scale=scale)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, weight, _, bias, _, activation = args
    struct = Args(out_features=weight.shape[0], **fields(x, outs[0], bias, activation))
    return CpuLaunch("linear_int8", struct, dict(enumerate(_POINTERS[:5])), outs, args)


KERNELS = [Kernel("linear_int8 C++", "cpu", decline, bind)]
