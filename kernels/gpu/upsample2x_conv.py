"""Upsampling and convolution on NVIDIA GPUs: an implicit matrix product for each of the four output phases.

A program makes BLOCK_M pixels of one phase by BLOCK_N output channels; its sum runs over four taps and the input
channels, in that order, in float32.  The programs of one block of pixels follow each other, so that its four phases
read x from the cache.  Products of float32 inputs are exact to float32 ("ieee").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, meta, power
from fusegen.kernels.gpu.tune import SHARED_BYTES, Tunable
from fusegen.kernels.op import FLOATS, Kernel, is_channels_last

X, FILTERS, BIAS = range(3)  # positions of the tensors in the schema
SMALLEST = 16  # tl.dot's least extent


@triton.jit
def upsample2x_conv_kernel(
    x, filters, bias, y, x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w, pixels, height, width, inputs, outputs,
    BIAS: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Phase program_id(0) % 4 of one block of pixels of x (all samples in one row) and of output channels."""
    phase, p, q = tl.program_id(0) % 4, tl.program_id(0) % 4 // 2, tl.program_id(0) % 2
    m = tl.program_id(0) // 4 * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    b, row, column = (m // (height * width)).to(tl.int64), m // width % height, m % width
    start = x + b * x_b + row * x_h + column * x_w
    weights = filters + phase * 4 * tl.cast(inputs, tl.int64) * outputs + k[:, None] * outputs + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(inputs, BLOCK_K)
    for step in tl.range(0, 4 * steps):
        tap, first = step // steps, step % steps * BLOCK_K
        down, right = tap // 2 - 1 + p, tap % 2 - 1 + q
        r, c = row + down, column + right
        inside = (m < pixels) & (r >= 0) & (r < height) & (c >= 0) & (c < width)
        at = start[:, None] + down * x_h + right * x_w + (first + k[None, :]) * x_c
        w = weights + (tap * inputs + first).to(tl.int64) * outputs
        keep_k = first + k < inputs
        a = tl.load(at, mask=inside[:, None] if EVEN_K else inside[:, None] & keep_k[None, :], other=0.0)
        if EVEN_K and EVEN_N:
            f = tl.load(w)
        else:
            f = tl.load(w, mask=keep_k[:, None] & (n < outputs)[None, :], other=0.0)
        acc = tl.dot(a, f, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    to = y + b * y_b + (2 * row + p) * y_h + (2 * column + q) * y_w
    keep = (m < pixels)[:, None] & (n < outputs)[None, :]
    tl.store(to[:, None] + n[None, :].to(tl.int64) * y_c, acc.to(y.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class Config:
    """A tile of ``m`` pixels by ``n`` output channels, ``k`` input channels a step."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


def key(x: Tensor, filters: Tensor, *rest: Any) -> str:
    """Sizes of one sample, layout and dtype."""
    layout = "last" if is_channels_last(x) else "first"
    kind = f"{layout} {str(x.dtype).removeprefix('torch.')}"
    return f"{x.shape[2]}x{x.shape[3]} {x.shape[1]}->{filters.shape[5]} {kind}"


def _shared(config: Config, size: int) -> int:
    return config.num_stages * config.k * (config.m + config.n) * size


def default(x: Tensor, filters: Tensor, *rest: Any, limit: int = SHARED_BYTES) -> Config:
    """128 x 128 tiles where one sample has enough pixels for them, else 64 x 64."""
    n, k = (max(SMALLEST, power(size)) for size in (filters.shape[5], x.shape[1]))
    if x.dtype == torch.float32:
        return Config(64, min(64, n), min(16, k), 4, 2)
    if x.shape[2] * x.shape[3] >= 1024 and n >= 128:
        found = Config(128, 128, min(64, k), 8, 4)
        return found if _shared(found, 2) <= limit else Config(128, 128, min(64, k), 8, 3)
    return Config(64, min(64, n), min(64, k), 4, 4)


def space(x: Tensor, filters: Tensor, *rest: Any) -> Iterator[Config]:
    """Tiles from 64 x 32 to 128 x 256: as wide as two or three fit a multiprocessor, or one reads least again."""
    widest, deepest = max(SMALLEST, power(filters.shape[5])), max(SMALLEST, power(x.shape[1]))
    single = x.dtype == torch.float32
    tiles = ((64, 32), (64, 64)) if single else ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256))
    for m, n in dict.fromkeys((m, min(widest, n)) for m, n in tiles):
        for k in (16, 32) if single else (64,):
            for stages in (2, 3) if single else (3, 4):
                config = Config(m, n, min(deepest, k), 8 if m * n > 4096 else 4, stages)
                if _shared(config, x.element_size()) <= SHARED_BYTES:
                    yield config


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """One launch."""
    x, filters, bias = args
    (y,) = outs
    if not y.numel():
        return ()
    batch, inputs, height, width = x.shape
    outputs, pixels = filters.shape[5], batch * height * width
    values = {
        "x": Use(X),
        "filters": Use(FILTERS),
        "bias": Use(FILTERS) if bias is None else Use(BIAS),
        "y": y,
        **{f"x_{axis}": x.stride(i) for i, axis in enumerate("bchw")},
        **{f"y_{axis}": y.stride(i) for i, axis in enumerate("bchw")},
        "pixels": pixels,
        "height": height,
        "width": width,
        "inputs": inputs,
        "outputs": outputs,
        "BIAS": bias is not None,
        "EVEN_K": inputs % config.k == 0,
        "EVEN_N": outputs % config.n == 0,
        "BLOCK_M": config.m,
        "BLOCK_N": config.n,
        "BLOCK_K": config.k,
    }
    grid = (4 * blocks(pixels, config.m), blocks(outputs, config.n))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return (Stage(upsample2x_conv_kernel, grid, values, options),)


def decline(x: Tensor, filters: Tensor, bias: Tensor | None) -> str | None:
    """Strided filters, other dtypes, and a sample past 32-bit offsets."""
    if x.dim() != 4 or filters.dim() != 6:
        return f"x has {x.dim()} dimensions and filters have {filters.dim()}, not 4 and 6"
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    for name, tensor in (("filters", filters), ("bias", bias)):
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} is strided"
    if x.numel() and sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31:
        return "a sample of x spans 2^31 elements or more"
    if 4 * filters.shape[5] * x.shape[2] * x.shape[3] >= 2**31 or x.shape[0] * x.shape[2] * x.shape[3] >= 2**29:
        return "the output has 2^31 elements a sample, or 2^31 pixels, or more"
    return None


def small(x: Tensor, filters: Tensor, *rest: Any) -> Iterator[Config]:
    yield Config(16, 16, 16, 4, 2)


def specimens() -> Iterator[Named]:
    for dtype, kind in SHORT.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            for shape in ((2, 640, 32, 32), (2, 160, 16, 16)):
                x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
                args = (x, meta(2, 2, 2, 2, shape[1], shape[1], dtype=dtype), meta(shape[1], dtype=dtype))
                where = "contiguous" if layout == torch.contiguous_format else "channels-last"
                yield f"{kind} {shape[1]}x{shape[2]}x{shape[3]} {where}", lambda args=args: args  # type: ignore[misc]


TUNABLE = Tunable("upsample2x_conv", Config, key, default, space, stages, Path(__file__), small)
KERNELS = [Kernel("upsample2x_conv.triton", "cuda", decline, TUNABLE.bind)]
