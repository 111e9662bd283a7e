"""Launcher of filtered_lrelu.cpp."""

from __future__ import annotations

import ctypes
import math
from typing import Any

from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.cpu.planes import declined, planes, steps
from fusegen.kernels.filtered_lrelu import axes
from fusegen.kernels.op import FLOATS, Kernel, is_channels_last


class Args(ctypes.Structure):
    """``fg_filtered_lrelu_args`` of abi_images.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "up_filter", "down_filter", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "up_dtype", "down_dtype", "bias_dtype")),
        *((f"{n}_{f}", ctypes.c_int64) for n in ("up", "down") for f in ("separable", "filter_y", "filter_x")),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "pixel")),
        *((f"{n}_{d}", ctypes.c_int64) for d in "xy" for n in ("size", "mid", "out", "before", "up_taps", "down_taps")),
        *((name, ctypes.c_int64) for name in ("up", "down", "x_batch", "x_channel", "x_row", "flip")),
        *((name, ctypes.c_double) for name in ("gain", "slope", "clamp")),
    ]


def decline(
    x: Tensor, up_filter: Tensor | None, down_filter: Tensor | None, bias: Tensor | None, *rest: Any
) -> str | None:
    if bias is not None and (bias.dtype not in FLOATS or not bias.is_contiguous()):
        return f"bias is strided or {bias.dtype}"
    (rise_x, fall_x), (rise_y, fall_y) = axes(x, up_filter, down_filter, bias, *rest)
    passes = [(up_filter, (rise_x, rise_y)), (down_filter, (fall_x, fall_y))]
    return declined(x, is_channels_last(x), passes)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, up_filter, down_filter, bias, up, down, _, gain, slope, clamp, flip = args
    sizes: dict[str, int] = {}
    for d, (rise, fall) in zip("xy", axes(*args), strict=True):
        sizes |= {f"size_{d}": rise.size, f"mid_{d}": rise.out, f"out_{d}": fall.out, f"before_{d}": rise.before}
        sizes |= {f"up_taps_{d}": rise.taps, f"down_taps_{d}": fall.taps}
    for name, filter in (("up", up_filter), ("down", down_filter)):
        fields = zip(("separable", "filter_y", "filter_x"), steps(filter), strict=True)
        sizes |= {f"{name}_{field}": value for field, value in fields}
        sizes[f"{name}_dtype"] = 0 if filter is None else DTYPES[filter.dtype]
    struct = Args(
        out=outs[0].data_ptr(),
        dtype=DTYPES[x.dtype],
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        up=up,
        down=down,
        flip=flip,
        gain=gain,
        slope=slope,
        clamp=math.inf if clamp is None else clamp,
        **planes(x, is_channels_last(x)),
        **sizes,
    )
    return CpuLaunch("filtered_lrelu", struct, {0: "x", 1: "up_filter", 2: "down_filter", 3: "bias"}, outs, args)


KERNELS = [Kernel("filtered_lrelu C++", "cpu", decline, bind)]
