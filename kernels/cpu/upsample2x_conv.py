"""Launcher of upsample2x_conv.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.op import FLOATS, Kernel

_AXES = ("batch", "channel", "row", "column")
# The four phases have 16/9 of the weight's elements.  Where a sample has few pixels for them, reading the filters takes
# the time, not the products: in bfloat16, 8 x 8 pixels of 1280 channels, oneDNN on the upsampled image was 1.1 times as
# fast (AMX, two cores).  In float32 the products are slower and the phases still win.
FEW_PIXELS, MANY_FILTERS = 128, 1 << 18


class Args(ctypes.Structure):
    """``fg_upsample2x_conv_args`` of abi_images.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "filters", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "bias_dtype")),
        *((name, ctypes.c_int64) for name in ("batch", "inputs", "outputs", "height", "width")),
        *((f"{name}_{axis}", ctypes.c_int64) for name in ("x", "out") for axis in _AXES),
    ]


def decline(x: Tensor, filters: Tensor, bias: Tensor | None) -> str | None:
    if x.dim() != 4 or filters.dim() != 6:
        return f"x has {x.dim()} dimensions and filters have {filters.dim()}, not 4 and 6"
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if x.numel() and x.stride(1) != 1 and x.stride(3) != 1 and x.shape[3] > 1:
        return "x has neither its channels nor its columns together"
    few = x.shape[2] * x.shape[3] < FEW_PIXELS and filters.shape[4] * filters.shape[5] > MANY_FILTERS
    if x.dtype == torch.bfloat16 and few:
        return f"{x.shape[2]} x {x.shape[3]} pixels a sample are too few for so many filters"
    if not filters.is_contiguous():
        return "filters are strided"
    if bias is not None and (bias.dtype not in (x.dtype, torch.float32) or not bias.is_contiguous()):
        return f"bias is {bias.dtype} or strided, not float32 or x's {x.dtype}"
    return None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, filters, bias = args
    batch, inputs, height, width = x.shape
    struct = Args(
        out=outs[0].data_ptr(),
        dtype=DTYPES[x.dtype],
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        batch=batch,
        inputs=inputs,
        outputs=filters.shape[5],
        height=height,
        width=width,
        **{f"x_{axis}": x.stride(i) for i, axis in enumerate(_AXES)},
        **{f"out_{axis}": outs[0].stride(i) for i, axis in enumerate(_AXES)},
    )
    return CpuLaunch("upsample2x_conv", struct, {0: "x", 1: "filters", 2: "bias"}, outs, args)


KERNELS = [Kernel("upsample2x_conv C++", "cpu", decline, bind)]
