"""Launcher of modulated_conv2d.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.modulated_conv2d import finish, sizes
from fusegen.kernels.op import FLOATS, Kernel, is_channels_last

MOST_TAPS = 1024  # kMostTaps of modulated_conv2d.cpp
_SIZES = (
    "batch channels outputs height width taps_y taps_x up pad_y pad_x out_y out_x".split()
)  # as Sizes and the struct call them


class Args(ctypes.Structure):
    """``fg_modulated_conv2d_args`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "styles", "noise", "bias", "out")),
        *((f"{name}dtype", ctypes.c_int64) for name in ("", "weight_", "styles_", "noise_", "bias_")),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int64) for name in ("x_batch", "x_channel", "x_row", "x_col", "noise_batch")),
        *((name, ctypes.c_int64) for name in ("channels_last", "demodulate", "act")),
        *((name, ctypes.c_double) for name in ("alpha", "gain", "clamp", "eps")),
    ]


def decline(
    x: Tensor, weight: Tensor, styles: Tensor, noise: Tensor | None, bias: Tensor | None, *rest: Any
) -> str | None:
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if x.shape[3] > 1 and x.stride(3) != 1 and not is_channels_last(x):
        return "x's rows are strided"
    if weight.shape[2] * weight.shape[3] > MOST_TAPS:
        return f"a filter has {weight.shape[2] * weight.shape[3]} taps (limit {MOST_TAPS})"
    for name, tensor in (("weight", weight), ("styles", styles), ("noise", noise), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in (x.dtype, *FLOATS[:1]):
            return f"{name} is {tensor.dtype}, neither float32 nor x's {x.dtype}"
        if not tensor.is_contiguous():
            return f"{name} is strided"
    return None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, weight, styles, noise, bias, demodulate, _, _, act, alpha, gain, clamp, eps = args
    s, found, last = sizes(*args[:8]), finish("modulated_conv2d", act, alpha, gain, clamp), is_channels_last(x)
    given = {"weight": weight, "styles": styles, "noise": noise, "bias": bias}
    struct = Args(
        out=outs[0].data_ptr(),
        dtype=DTYPES[x.dtype],
        x_batch=x.stride(0),
        x_channel=x.stride(1),
        x_row=x.stride(2),
        x_col=x.stride(3) if last else 1,
        noise_batch=0 if noise is None or noise.shape[0] == 1 else s.out_y,
        channels_last=is_channels_last(outs[0]),
        demodulate=demodulate,
        act=found.act,
        alpha=found.alpha,
        gain=found.gain,
        clamp=found.clamp,
        eps=eps,
        **{name: getattr(s, name) for name in _SIZES},
        **{f"{name}_dtype": 0 if t is None else DTYPES[t.dtype] for name, t in given.items()},
    )
    return CpuLaunch("modulated_conv2d", struct, dict(enumerate(("x", *given))), outs, args)


KERNELS = [Kernel("modulated_conv2d C++", "cpu", decline, bind)]
