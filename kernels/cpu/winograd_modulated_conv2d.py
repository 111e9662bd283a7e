"""Launcher of winograd_modulated_conv2d.cpp."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu import library
from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.cpu.modulated_conv2d import LEAST
from fusegen.kernels.cpu.winograd_conv2d import few_pairs, too_many
from fusegen.kernels.op import FLOATS, Kernel, is_channels_last
from fusegen.kernels.winograd_modulated_conv2d import NAME, finish

FEWER = 4  # so many times fewer tiles than a plain convolution pay: a library is slower with so few pixels
# Pixels of a sample from which an image to be upsampled in bfloat16 is faster here, by products of float32, than by a
# library's and what follows it.  On a Zen 5 StyleGAN2 took 0.94 times as long with those of 64 x 64 and more here, 0.96
# with all.
MANY = 64 * 64
GIVEN = {0: "x", 1: "filters", 2: "squares", 3: "styles", 5: "taps", 6: "noise", 7: "bias"}  # by argument


class Args(ctypes.Structure):
    """``fg_winograd_modulated_conv2d_args`` of abi_images.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "styles", "filters", "squares", "taps", "noise", "bias", "out")),
        *((f"{name}dtype", ctypes.c_int64) for name in ("", "styles_", "taps_", "noise_", "bias_")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "inputs", "outputs", "height", "width", "noise_batch", "pairs", "act")
        ),
        *((name, ctypes.c_double) for name in ("alpha", "gain", "clamp", "eps")),
    ]


def decline(*args: Any) -> str | None:
    x, filters, squares, styles, outputs, taps, noise, bias = args[:8]
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if not is_channels_last(x):
        return "x is not channels-last"
    pairs = filters.dim() == 6
    for name, tensor in (("filters", filters), ("squares", squares)):
        wanted = torch.bfloat16 if pairs and name == "filters" else torch.float32
        if tensor.dtype != wanted or not tensor.is_contiguous():
            return f"{name} are not dense {wanted}"
    for name, tensor in (("styles", styles), ("taps", taps), ("noise", noise), ("bias", bias)):
        if tensor is not None and (tensor.dtype not in (x.dtype, torch.float32) or not tensor.is_contiguous()):
            return f"{name} is strided or {tensor.dtype}, neither float32 nor x's {x.dtype}"
    if pairs:
        return "an image upsampled takes more products by smaller tiles" if taps is not None else few_pairs(x, outputs)
    if x.dtype == torch.bfloat16 and (reason := _better_in_bfloat16(x, outputs, taps)):
        return reason
    up = 1 if taps is None else 2
    tiles = x.shape[0] * (-(-up * x.shape[2] // 4)) * (-(-up * x.shape[3] // 4))
    return too_many(x.shape[1] * outputs, FEWER * tiles)


def _better_in_bfloat16(x: Tensor, outputs: int, taps: Tensor | None) -> str | None:
    """The products here are of float32: where a library takes the convolution, on a CPU with products of bfloat16, it
    may be faster without Winograd."""
    if 9 * outputs * math.prod(x.shape[1:]) < LEAST:
        return None
    if library.level() == "amx":
        return "tiles of bfloat16 are faster"
    if library.level() == "avx512_bf16" and taps is not None and math.prod(x.shape[2:]) < MANY:
        return "a transposed convolution of so few pixels is as fast by products of bfloat16"
    return None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, filters, _, styles, outputs, taps, noise, bias, act, alpha, gain, clamp, eps = args
    batch, inputs, height, width = x.shape
    found = finish(NAME, act, alpha, gain, clamp)
    given = {"styles": styles, "taps": taps, "noise": noise, "bias": bias}
    struct = Args(
        out=outs[0].data_ptr(), dtype=DTYPES[x.dtype], batch=batch, inputs=inputs, outputs=outputs, height=height,
        width=width, noise_batch=0 if noise is None or noise.shape[0] == 1 else noise[0].numel(),
        pairs=filters.dim() == 6, act=found.act, alpha=found.alpha, gain=found.gain, clamp=found.clamp, eps=eps,
        **{f"{k}_dtype": 0 if t is None else DTYPES[t.dtype] for k, t in given.items()},
    )  # fmt: skip
    return CpuLaunch(NAME, struct, GIVEN, outs, args)


KERNELS = [Kernel("winograd_modulated_conv2d C++", "cpu", decline, bind)]
