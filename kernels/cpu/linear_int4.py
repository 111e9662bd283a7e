"""Launcher of linear_int4.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.cpu.quantized import fields, unserved
from fusegen.kernels.linear_int4 import group_of
from fusegen.kernels.op import Kernel

_POINTERS = ("x", "weight", "scales", "zeros", "bias", "residual", "out")
_PLACES = {0: "x", 1: "weight", 2: "scales", 4: "zeros", 5: "bias", 6: "residual"}  # in the schema
_INTEGERS = (
    "dtype", "scale_dtype", "bias_dtype", "outer", "inner", "width", "x_outer", "x_inner", "out_features", "groups",
    "group", "activation", "quantize",
)  # fmt: skip


class Args(ctypes.Structure):
    """``fg_linear_int4_args`` of abi.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_int64) for name in _INTEGERS]


def decline(
    x: Tensor, weight: Tensor, scales: Tensor, out_features: int, zeros: Any, bias: Any, residual: Any,
    activation: str, inputs: str,
) -> str | None:  # fmt: skip
    if scales.dtype not in (torch.float16, torch.float32):
        return f"scales are {scales.dtype}"
    return unserved(x, bias, residual, weight=weight, scales=scales, zeros=zeros)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, weight, scales, out_features, _, bias, _, activation, inputs = args
    struct = Args(
        scale_dtype=DTYPES[scales.dtype],
        out_features=out_features,
        groups=scales.shape[1],
        group=group_of(weight, scales),
        quantize=inputs == "int8",
        **fields(x, outs[0], bias, activation),
    )
    return CpuLaunch("linear_int4", struct, _PLACES, outs, args)


KERNELS = [Kernel("linear_int4 C++", "cpu", decline, bind)]
