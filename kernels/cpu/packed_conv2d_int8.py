"""Launcher of packed_conv2d_int8.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.op import FLOATS, Kernel, is_channels_last

_POINTERS = ("x", "taps", "sums", "scale", "bias", "residual", "out")


class Args(ctypes.Structure):
    """``fg_packed_conv2d_int8_args`` of abi_images.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("dtype", "bias_dtype")),
        *((name, ctypes.c_int64) for name in ("batch", "inputs", "outputs", "height", "width", "stride", "doubled")),
    ]


def decline(
    x: Tensor, taps: Tensor, sums: Tensor, scale: Tensor, outputs: int, bias: Tensor | None, residual: Tensor | None,
    stride: int, doubled: bool,
) -> str | None:  # fmt: skip
    if x.dtype not in FLOATS or scale.dtype != torch.float32:
        return f"x is {x.dtype}, scale {scale.dtype}"
    if bias is not None and bias.dtype not in (x.dtype, torch.float32):
        return f"bias is {bias.dtype}, neither float32 nor x's {x.dtype}"
    if not is_channels_last(x) and (doubled or x.shape[2:] != (1, 1)):
        return "x is not channels-last"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is strided"
    if residual is not None and not residual.is_contiguous(memory_format=torch.channels_last):
        return "residual is not channels-last"
    if not all(t is None or t.is_contiguous() for t in (taps, sums, scale, bias)):
        return "taps, sums, scale or bias are strided"
    return None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, _, _, _, outputs, bias, _, stride, doubled = args
    struct = Args(
        out=outs[0].data_ptr(), dtype=DTYPES[x.dtype], bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        batch=x.shape[0], inputs=x.shape[1], outputs=outputs, height=x.shape[2], width=x.shape[3], stride=stride,
        doubled=doubled,
    )  # fmt: skip
    pointers = {0: "x", 1: "taps", 2: "sums", 3: "scale", 5: "bias", 6: "residual"}
    return CpuLaunch("packed_conv2d_int8", struct, pointers, outs, args)


KERNELS = [Kernel("packed_conv2d_int8 C++", "cpu", decline, bind)]
