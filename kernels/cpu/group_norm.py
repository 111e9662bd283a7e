"""Launcher of group_norm.cpp."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.group_norm import ACTIVATIONS, is_channels_last
from fusegen.kernels.op import FLOATS, Kernel


class Args(ctypes.Structure):
    """``fg_group_norm_args`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "weight_dtype", "bias_dtype")),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "groups", "pixels", "x_batch")),
        *((name, ctypes.c_int64) for name in ("channels_last", "silu")),
        ("eps", ctypes.c_double),
    ]


def _dense_samples(x: Tensor) -> bool:
    """Whether each sample is contiguous; samples may lie apart."""
    return x.numel() == 0 or x[0].is_contiguous()


def decline(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str
) -> str | None:
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if not is_channels_last(x) and not _dense_samples(x):
        return "x's samples are neither contiguous nor channels-last"
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in (x.dtype, torch.float32):
            return f"{name} is {tensor.dtype}, neither float32 nor x's {x.dtype}"
        if not tensor.is_contiguous():
            return f"{name} is strided"
    return None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, num_groups, weight, bias, eps, activation = args
    struct = Args(
        out=outs[0].data_ptr(),
        dtype=DTYPES[x.dtype],
        weight_dtype=0 if weight is None else DTYPES[weight.dtype],
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        batch=x.shape[0],
        channels=x.shape[1],
        groups=num_groups,
        pixels=math.prod(x.shape[2:]),
        x_batch=x.stride(0),
        channels_last=is_channels_last(x),
        silu=ACTIVATIONS.index(activation),
        eps=eps,
    )
    return CpuLaunch("group_norm", struct, {0: "x", 2: "weight", 3: "bias"}, outs, args)


KERNELS = [Kernel("group_norm C++", "cpu", decline, bind)]
