"""Launcher of packed_conv2d.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.op import Kernel, is_channels_last


class Args(ctypes.Structure):
    """``fg_packed_conv2d_args`` of abi_images.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "taps", "bias", "residual", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "bias_dtype")),
        *((name, ctypes.c_int64) for name in ("batch", "inputs", "outputs", "height", "width", "stride", "doubled")),
        ("moments", ctypes.c_void_p),
    ]


def decline(
    x: Tensor, taps: Tensor, outputs: int, bias: Tensor | None, residual: Tensor | None, stride: int, doubled: bool
) -> str | None:
    for name, tensor in (("x", x), ("taps", taps), ("residual", residual)):
        if tensor is not None and tensor.dtype != torch.bfloat16:
            return f"{name} is {tensor.dtype}, not torch.bfloat16"
    if bias is not None and bias.dtype not in (torch.bfloat16, torch.float32):
        return f"bias is {bias.dtype}"
    if not is_channels_last(x) and (doubled or x.shape[2:] != (1, 1)):
        return "x is not channels-last"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "x is strided"
    if residual is not None and not residual.is_contiguous(memory_format=torch.channels_last):
        return "residual is not channels-last"
    if not taps.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        return "taps or bias are strided"
    return None


def launch(op: str, outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    """``op`` is packed_conv2d, or packed_conv2d_moments, whose second output are the moments."""
    x, _, outputs, bias, _, stride, doubled = args
    struct = Args(
        out=outs[0].data_ptr(), dtype=DTYPES[x.dtype], bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        batch=x.shape[0], inputs=x.shape[1], outputs=outputs, height=x.shape[2], width=x.shape[3], stride=stride,
        doubled=doubled, moments=outs[1].data_ptr() if len(outs) > 1 else None,
    )  # fmt: skip
    return CpuLaunch(op, struct, {0: "x", 1: "taps", 3: "bias", 4: "residual"}, outs, args)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    return launch("packed_conv2d", outs, args)


KERNELS = [Kernel("packed_conv2d C++", "cpu", decline, bind)]
