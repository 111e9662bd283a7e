"""Launcher of winograd_conv2d_int8.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.cpu.winograd_conv2d import small_tiles
from fusegen.kernels.op import FLOATS, Kernel, is_channels_last

# The filters have 16 codes for nine.  On a Zen 5 one tile of 1280 channels took 1.2 times as long as oneDNN, two 0.7.
FEW_TILES, MANY_FILTERS = 2, 1 << 20  # pairs of channels
_POINTERS = ("x", "filters", "scale", "bias", "residual", "out")


class Args(ctypes.Structure):
    """``fg_winograd_conv2d_int8_args`` of abi_images.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in ("dtype", "bias_dtype")),
        *((name, ctypes.c_int64) for name in ("batch", "inputs", "outputs", "height", "width", "doubled")),
    ]


def decline(
    x: Tensor, filters: Tensor, scale: Tensor, outputs: int, bias: Tensor | None, residual: Tensor | None, doubled: bool
) -> str | None:
    if x.dtype not in FLOATS or scale.dtype != torch.float32:
        return f"x is {x.dtype}, scale {scale.dtype}"
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None and not is_channels_last(tensor):
            return f"{name} is not channels-last"
    if residual is not None and residual.dtype != x.dtype:
        return f"residual is {residual.dtype}, not x's {x.dtype}"
    if bias is not None and bias.dtype not in (x.dtype, torch.float32):
        return f"bias is {bias.dtype}, neither float32 nor x's {x.dtype}"
    if not all(t is None or t.is_contiguous() for t in (filters, scale, bias)):
        return "filters, scale or bias are strided"
    tiles = small_tiles(x, doubled)
    if tiles < FEW_TILES and x.shape[1] * outputs >= MANY_FILTERS:
        return f"{tiles} tiles are too few for so many filters"
    return None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, _, _, outputs, bias, _, doubled = args
    height, width = outs[0].shape[2:]
    struct = Args(
        out=outs[0].data_ptr(), dtype=DTYPES[x.dtype], bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        batch=x.shape[0], inputs=x.shape[1], outputs=outputs, height=height, width=width, doubled=doubled,
    )  # fmt: skip
    pointers = {0: "x", 1: "filters", 2: "scale", 4: "bias", 5: "residual"}
    return CpuLaunch("winograd_conv2d_int8", struct, pointers, outs, args)


KERNELS = [Kernel("winograd_conv2d_int8 C++", "cpu", decline, bind)]
