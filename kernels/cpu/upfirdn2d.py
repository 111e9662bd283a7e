"""Launcher of upfirdn2d.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.cpu.planes import declined, planes, steps
from fusegen.kernels.op import Kernel, is_channels_last
from fusegen.kernels.upfirdn2d import axes


class Args(ctypes.Structure):
    """``fg_upfirdn2d_args`` of abi_images.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "filter", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "filter_dtype", "separable", "filter_y", "filter_x")),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "pixel")),
        *((f"{n}_{d}", ctypes.c_int64) for d in "xy" for n in ("size", "out", "up", "down", "before", "taps")),
        *((name, ctypes.c_int64) for name in ("x_batch", "x_channel", "x_row", "flip")),
        ("gain", ctypes.c_double),
    ]


def decline(x: Tensor, filter: Tensor | None, *rest: Any) -> str | None:
    return declined(x, is_channels_last(x), [(filter, axes(x, filter, *rest))])


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, filter, up, down, padding, flip, gain = args
    along = dict(zip("xy", axes(x, filter, up, down, padding), strict=True))
    separable, filter_y, filter_x = steps(filter)
    struct = Args(
        out=outs[0].data_ptr(),
        dtype=DTYPES[x.dtype],
        filter_dtype=0 if filter is None else DTYPES[filter.dtype],
        separable=separable,
        filter_y=filter_y,
        filter_x=filter_x,
        flip=flip,
        gain=gain,
        **planes(x, is_channels_last(x)),
        **{
            f"{n}_{d}": getattr(a, n) for d, a in along.items() for n in ("size", "out", "up", "down", "before", "taps")
        },
    )
    return CpuLaunch("upfirdn2d", struct, {0: "x", 1: "filter"}, outs, args)


KERNELS = [Kernel("upfirdn2d C++", "cpu", decline, bind)]
