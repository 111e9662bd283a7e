"""Launcher of winograd_conv2d.cpp."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu import library
from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.op import Kernel, is_channels_last

# The filters have four times the weight's elements.  Where there are few tiles for them, reading them takes the time.
FEW_TILES, MANY_FILTERS, MOST_FILTERS = 64, 1 << 17, 1 << 19  # pairs of channels
# In bfloat16 they have 16 for nine.  On a Zen 5 one tile of 512 channels took 1.2 times as long as oneDNN, four of 1280
# 1.04 times, eight 0.7 times, and more still less.
FEW_PAIR_TILES, MANY_PAIRS = 8, 1 << 18

# Of taps they are made in every call, once for all tiles, which are of 2 x 2 outputs where there would be few of 4 x 4
# (winograd_taps.h).  On a Zen 3 1280 channels took as long as oneDNN with 16 such tiles, 0.8 times with 32, 1.4 with 8.
FEW_LARGE, FEW_MADE = 16, 16


class Args(ctypes.Structure):
    """``fg_winograd_conv2d_args`` of abi_images.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "filters", "bias", "residual", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "bias_dtype")),
        *((name, ctypes.c_int64) for name in ("batch", "inputs", "outputs", "height", "width", "doubled", "taps")),
        ("moments", ctypes.c_void_p),
    ]


def decline(
    x: Tensor, filters: Tensor, outputs: int, bias: Tensor | None, residual: Tensor | None, doubled: bool
) -> str | None:
    if filters.dim() == 6:
        reason = _pairs(x, filters, outputs, bias, doubled)
    elif doubled:
        return "filters of 6 x 6 points are not for images that are doubled"
    else:
        own = filters.dim() == 4
        reason = too_few(x, outputs) if own else too_many(x.shape[1] * outputs, x.shape[0] * large_tiles(x))
        for name, tensor in (("x", x), ("filters", filters), ("bias", bias)):
            if tensor is not None and tensor.dtype != torch.float32:
                return f"{name} is {tensor.dtype}"
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor is not None and not is_channels_last(tensor):
            return f"{name} is not channels-last"
    if not filters.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        return "filters or bias are strided"
    return reason


def _pairs(x: Tensor, filters: Tensor, outputs: int, bias: Tensor | None, doubled: bool) -> str | None:
    """Why the products of bfloat16 pairs do not serve, or None."""
    if filters.dtype != torch.bfloat16:
        return f"filters are {filters.dtype}, in pairs"
    if bias is not None and bias.dtype not in (torch.bfloat16, torch.float32):
        return f"bias is {bias.dtype}"
    return few_pairs(x, outputs, doubled)


def small_tiles(x: Tensor, doubled: bool) -> int:
    """How many tiles of 2 x 2 outputs there are of x (B, I, H, W), of one that is ``doubled`` four for each such."""
    return x.shape[0] * math.prod(n if doubled else -(-n // 2) for n in x.shape[2:])


def few_pairs(x: Tensor, outputs: int, doubled: bool = False) -> str | None:
    """Why products of bfloat16 pairs are not for ``x`` (B, I, H, W), or None."""
    if x.dtype != torch.bfloat16:
        return f"x is {x.dtype}, the filters bfloat16"
    if library.level() != "avx512_bf16":
        return f"the level {library.level()} has {'faster' if library.level() == 'amx' else 'no'} products of bfloat16"
    tiles = small_tiles(x, doubled)
    if x.shape[1] * outputs >= MANY_PAIRS and tiles < FEW_PAIR_TILES:
        return f"{tiles} tiles are too few for so many filters"
    return None


def too_many(pairs: int, tiles: int) -> str | None:
    """Why the filters of so many pairs of channels are too large for ``tiles`` tiles, or None."""
    if pairs > MOST_FILTERS:
        return f"its filters would take {36 * 4 * pairs >> 20} MiB"
    if pairs > MANY_FILTERS and tiles < FEW_TILES:
        return f"{tiles} tiles are too few for so many filters"
    return None


def large_tiles(x: Tensor) -> int:
    """How many tiles of 4 x 4 outputs a sample of x (B, I, H, W) has."""
    return math.prod(-(-n // 4) for n in x.shape[2:])


def too_few(x: Tensor, outputs: int) -> str | None:
    """Why the filters of so many pairs of channels are not made anew for the tiles of ``x`` (B, I, H, W), or None."""
    tiles = small_tiles(x, False) if large_tiles(x) < FEW_LARGE else x.shape[0] * large_tiles(x)
    few = x.shape[1] * outputs > MANY_FILTERS and tiles < FEW_MADE
    return f"{tiles} tiles are too few to make filters for" if few else None


def launch(op: str, outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    """``op`` bound to its arguments and outputs: the images, and moments where it leaves them."""
    x, filters, outputs, bias, _, doubled = args
    height, width = outs[0].shape[2:]
    struct = Args(
        out=outs[0].data_ptr(), dtype=DTYPES[x.dtype], bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        batch=x.shape[0], inputs=x.shape[1], outputs=outputs, height=height, width=width, doubled=doubled,
        taps=(2 if large_tiles(x) < FEW_LARGE else 4) if filters.dim() == 4 else 0,
        moments=outs[1].data_ptr() if len(outs) > 1 else None,
    )  # fmt: skip
    return CpuLaunch(op, struct, {0: "x", 1: "filters", 3: "bias", 4: "residual"}, outs, args)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    return launch("winograd_conv2d", outs, args)


KERNELS = [Kernel("winograd_conv2d C++", "cpu", decline, bind)]
