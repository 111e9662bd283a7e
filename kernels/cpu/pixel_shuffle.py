"""Launcher of pixel_shuffle.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from fusegen.kernels.cpu.library import CpuLaunch
from fusegen.kernels.op import FLOATS, Kernel, is_channels_last


class Args(ctypes.Structure):
    """``fg_pixel_shuffle_args`` of abi_images.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "out")),
        *((name, ctypes.c_int64) for name in ("element_bytes", "channels_last", "down", "factor")),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "height", "width")),
        *((name, ctypes.c_int64) for name in ("x_batch", "x_channel", "x_row", "x_column")),
    ]


def decline(x: Tensor, factor: int, down: bool) -> str | None:
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if x.dim() != 4:
        return f"x has {x.dim()} dimensions, not 4"
    if x.shape[3] > 1 and x.stride(3) != 1 and not is_channels_last(x):
        return "x's rows are strided"
    return None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, factor, down = args
    batch, channels, height, width = x.shape
    struct = Args(
        out=outs[0].data_ptr(),
        element_bytes=x.element_size(),
        channels_last=is_channels_last(x),
        down=down,
        factor=factor,
        batch=batch,
        channels=channels if down else channels // factor**2,
        height=height // factor if down else height,
        width=width // factor if down else width,
        x_batch=x.stride(0),
        x_channel=x.stride(1),
        x_row=x.stride(2),
        x_column=x.stride(3),
    )
    return CpuLaunch("pixel_shuffle", struct, {0: "x"}, outs, args)


KERNELS = [Kernel("pixel_shuffle C++", "cpu", decline, bind)]
