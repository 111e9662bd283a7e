"""Launcher of layer_norm.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.op import FLOATS, Kernel


class Args(ctypes.Structure):
    """``fg_layer_norm_args`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "weight_dtype", "bias_dtype")),
        *((name, ctypes.c_int64) for name in ("outer", "inner", "width", "x_outer", "x_inner")),
        ("eps", ctypes.c_double),
    ]


def rows(x: Tensor) -> tuple[int, int, int, int] | None:
    """The rows of x (*, C) as (outer, inner, outer stride, inner stride), or None where two strides do not reach."""
    dims: list[tuple[int, int]] = []  # (size, stride), outermost first, merged where one step continues the other
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == stride * size:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        return None
    dims = [(1, 0)] * (2 - len(dims)) + dims
    return dims[0][0], dims[1][0], dims[0][1], dims[1][1]


def decline(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return "x's last dimension is strided"
    if x.numel() and rows(x) is None:
        return "x's rows are not reached by two strides"
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in (x.dtype, torch.float32):
            return f"{name} is {tensor.dtype}, neither float32 nor x's {x.dtype}"
        if not tensor.is_contiguous():
            return f"{name} is strided"
    return None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, weight, bias, eps = args
    outer, inner, x_outer, x_inner = (rows(x) if x.numel() else None) or (0, 0, 0, 0)
    struct = Args(
        out=outs[0].data_ptr(),
        dtype=DTYPES[x.dtype],
        weight_dtype=0 if weight is None else DTYPES[weight.dtype],
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        outer=outer,
        inner=inner,
        width=x.shape[-1],
        x_outer=x_outer,
        x_inner=x_inner,
        eps=eps,
    )
    return CpuLaunch("layer_norm", struct, {0: "x", 1: "weight", 2: "bias"}, outs, args)


KERNELS = [Kernel("layer_norm C++", "cpu", decline, bind)]
