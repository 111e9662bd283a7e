"""Launcher of linear.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from fusegen.kernels.cpu.library import CpuLaunch
from fusegen.kernels.cpu.quantized import fields, unserved
from fusegen.kernels.op import Kernel

_POINTERS = ("x", "weight", "bias", "residual", "multiplier", "out")
_INTEGERS = (
    "dtype", "bias_dtype", "outer", "inner", "width", "x_outer", "x_inner", "out_features", "activation",
)  # fmt: skip


class Args(ctypes.Structure):
    """``fg_linear_args`` of abi.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_int64) for name in _INTEGERS]


def decline(x: Tensor, weight: Tensor, bias: Any, residual: Any, activation: str, multiplier: Any) -> str | None:
    if multiplier is not None and multiplier.dtype != x.dtype:
        return f"multiplier is {multiplier.dtype}, not x's {x.dtype}"
    return unserved(x, bias, residual, weight=weight, multiplier=multiplier)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, weight, bias, _, activation, _ = args
    struct = Args(out_features=weight.shape[0], **fields(x, outs[0], bias, activation))
    pointers = {0: "x", 1: "weight", 2: "bias", 3: "residual", 5: "multiplier"}
    return CpuLaunch("linear", struct, pointers, outs, args)


KERNELS = [Kernel("linear C++", "cpu", decline, bind)]
