"""Group normalization on NVIDIA GPUs, contiguous and channels-last by the same kernels.

A tensor is seen as (B, C, S) with any strides of C and S.  A slab (one sample's group) that fits a block's registers
takes one launch.  A larger one takes three, parallel also at batch 1: means and squared deviations of each channel over
each chunk of S; their combination per group (Chan, Golub & LeVeque 1983), in a fixed order; the normalization.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, meta, power
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.op import Kernel

X, WEIGHT, BIAS = 0, 2, 3  # positions of the tensors in the schema
SLAB = 16384  # elements of the padded tile that a one-launch program may hold in registers


@triton.jit
def _finish(x, weight, bias, channel, keep, mean, rstd, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr):
    """Normalize, scale and shift per channel, activate; ``channel``, ``mean`` and ``rstd`` are columns."""
    y = (x - mean) * rstd
    if WEIGHT:
        y = y * tl.load(weight + channel, mask=keep, other=0.0).to(tl.float32)
    if BIAS:
        y = y + tl.load(bias + channel, mask=keep, other=0.0).to(tl.float32)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def slab_kernel(
    x, weight, bias, y, x_b, x_c, x_s, y_b, y_c, y_s, groups, per_group, pixels, eps,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program a slab: (per_group, pixels) held whole in registers as a (BLOCK_C, BLOCK_S) tile."""
    b, group = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0) % groups
    c, s = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, BLOCK_S)[None, :]
    keep_c, keep = c < per_group, (c < per_group) & (s < pixels)
    channel, wide_s = (group * per_group + c).to(tl.int64), s.to(tl.int64)
    tile = tl.load(x + b * x_b + channel * x_c + wide_s * x_s, mask=keep, other=0.0).to(tl.float32)
    count = tl.cast(per_group * pixels, tl.float32)
    mean = tl.sum(tl.sum(tile, axis=1), axis=0) / count
    centred = tl.where(keep, tile - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(centred * centred, axis=1), axis=0) / count + eps)
    out = _finish(tile, weight, bias, channel, keep_c, mean, rstd, WEIGHT, BIAS, SILU)
    tl.store(y + b * y_b + channel * y_c + wide_s * y_s, out.to(y.dtype.element_ty), mask=keep)


@triton.jit
def partial_kernel(
    x, partial, x_b, x_c, x_s, channels, pixels, chunks, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over BLOCK_S pixels -> partial (B, chunks, 2, C)."""
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = chunk * BLOCK_S + tl.arange(0, BLOCK_S)
    keep = (c < channels)[:, None] & (s < pixels)[None, :]
    start = x + b * x_b + c[:, None].to(tl.int64) * x_c
    tile = tl.load(start + s[None, :].to(tl.int64) * x_s, mask=keep, other=0.0).to(tl.float32)
    mean = tl.sum(tile, axis=1) / tl.cast(tl.minimum(BLOCK_S, pixels - chunk * BLOCK_S), tl.float32)
    centred = tl.where(keep, tile - mean[:, None], 0.0)
    out = partial + (b * chunks + chunk) * 2 * channels + c
    tl.store(out, mean, mask=c < channels)
    tl.store(out + channels, tl.sum(centred * centred, axis=1), mask=c < channels)


@triton.jit
def combine_kernel(
    partial, stats, groups, per_group, pixels, chunks, eps, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The partial statistics of one group -> its mean and reciprocal deviation: stats (B, groups, 2)."""
    b, group = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0) % groups
    channels, count = groups * per_group, tl.cast(per_group, tl.float32) * pixels
    base = partial + b * chunks * 2 * channels + group * per_group
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, chunks * per_group, BLOCK):
        at = first + tl.arange(0, BLOCK)
        chunk, keep = at // per_group, at < chunks * per_group
        weight = tl.minimum(BLOCK_S, pixels - chunk * BLOCK_S).to(tl.float32)
        total += weight * tl.load(base + chunk * 2 * channels + at % per_group, mask=keep, other=0.0)
    mean = tl.sum(total, axis=0) / count
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, chunks * per_group, BLOCK):
        at = first + tl.arange(0, BLOCK)
        chunk, keep = at // per_group, at < chunks * per_group
        weight = tl.minimum(BLOCK_S, pixels - chunk * BLOCK_S).to(tl.float32)
        one = base + chunk * 2 * channels + at % per_group
        away = tl.load(one, mask=keep, other=0.0) - mean
        inside = tl.load(one + channels, mask=keep, other=0.0)
        total += tl.where(keep, inside + weight * away * away, 0.0)
    out = stats + tl.program_id(0) * 2
    tl.store(out, mean)
    tl.store(out + 1, 1.0 / tl.sqrt(tl.sum(total, axis=0) / count + eps))


@triton.jit
def apply_kernel(
    x, weight, bias, y, stats, x_b, x_c, x_s, y_b, y_c, y_s, channels, groups, per_group, pixels,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Normalize a (BLOCK_C, BLOCK_S) tile with the statistics of each channel's group."""
    b = tl.program_id(2).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    s = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S))[None, :]
    keep_c, keep = c < channels, (c < channels) & (s < pixels)
    stat = stats + (b * groups + c // per_group) * 2
    mean, rstd = tl.load(stat, mask=keep_c, other=0.0), tl.load(stat + 1, mask=keep_c, other=0.0)
    wide_c, wide_s = c.to(tl.int64), s.to(tl.int64)
    tile = tl.load(x + b * x_b + wide_c * x_c + wide_s * x_s, mask=keep, other=0.0).to(tl.float32)
    out = _finish(tile, weight, bias, c, keep_c, mean, rstd, WEIGHT, BIAS, SILU)
    tl.store(y + b * y_b + wide_c * y_c + wide_s * y_s, out.to(y.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class Config:
    """``slab``: one launch instead of three; ``block``: elements of a tile; ``channels``: of them in a row of it."""

    slab: bool
    block: int
    channels: int
    num_warps: int


def spatial(x: Tensor) -> tuple[int, int] | None:
    """Pixels of ``x`` (B, C, *) and the stride between them, or None where one stride does not serve."""
    size, stride = 1, 0
    for n, step in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if n == 1:
            continue
        if size > 1 and step != size * stride:
            return None
        size, stride = size * n, stride if size > 1 else step
    return (size, stride) if x.numel() else (math.prod(x.shape[2:]), stride)


def _tile(x: Tensor, groups: int) -> tuple[int, int]:
    """The tile that holds a whole slab."""
    return power(x.shape[1] // groups), power(math.prod(x.shape[2:]))


def _last(x: Tensor) -> bool:
    """Whether channels are nearer in memory than pixels."""
    return x.dim() > 2 and x.shape[1] > 1 and x.stride(1) < max(x.stride()[2:])


def key(x: Tensor, groups: int, weight: Any, bias: Any, eps: float, activation: str) -> str:
    """Everything but the batch."""
    layout = "last" if _last(x) else "first"
    return f"{x.shape[1]}x{math.prod(x.shape[2:])} {groups} {layout} {str(x.dtype).removeprefix('torch.')} {activation}"


def default(x: Tensor, groups: int, *rest: Any, limit: int = 0) -> Config:
    """One launch where the padded slab fits; else tiles of 4096 elements, 64 channels wide when those are innermost."""
    block_c, block_s = _tile(x, groups)
    if block_c * block_s <= SLAB:
        return Config(True, block_c * block_s, block_c, max(1, min(16, block_c * block_s // 512)))
    block = 4096
    channels = min(64, power(x.shape[1])) if _last(x) else max(1, min(power(x.shape[1]), block // block_s))
    return Config(False, block, channels, 4)


def space(x: Tensor, groups: int, *rest: Any) -> Iterator[Config]:
    """The slab with more or fewer warps up to twice its default limit; tiles of 1024 to 16384 elements."""
    block_c, block_s = _tile(x, groups)
    slab = block_c * block_s
    for warps in (1, 2, 4, 8, 16, 32):
        if slab <= 2 * SLAB and 4 <= slab // (32 * warps) <= 64:
            yield Config(True, slab, block_c, warps)
    for block in (1024, 2048, 4096, 8192, 16384):
        for warps in (4, 8, 16):
            for channels in (32, 64, 128) if _last(x) else (1, 4):
                if channels <= power(x.shape[1]) and 8 <= block // (32 * warps) <= 64 and slab >= 4096:
                    yield Config(False, block, channels, warps)


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """The launches for ``config``; the scratch of partial statistics is theirs."""
    x, groups, weight, bias, eps, activation = args
    (y,) = outs
    source, target = spatial(x), spatial(y)
    if not x.numel():
        return ()
    assert source is not None and target is not None
    (b, channels), (pixels, x_s), (_, y_s) = x.shape[:2], source, target
    per_group = channels // groups
    flags = {"WEIGHT": weight is not None, "BIAS": bias is not None, "SILU": activation == "silu"}
    tensors = {"x": Use(X), "weight": Use(WEIGHT) if flags["WEIGHT"] else Use(X), "y": y}
    tensors |= {"bias": Use(BIAS) if flags["BIAS"] else Use(X)}
    x_strides = {"x_b": x.stride(0), "x_c": x.stride(1), "x_s": x_s}
    strides = x_strides | {"y_b": y.stride(0), "y_c": y.stride(1), "y_s": y_s}
    sizes = {"groups": groups, "per_group": per_group, "pixels": pixels}
    warps = {"num_warps": config.num_warps}
    if config.slab:
        block_c, block_s = _tile(x, groups)
        values = tensors | strides | sizes | flags | {"eps": eps, "BLOCK_C": block_c, "BLOCK_S": block_s}
        return (Stage(slab_kernel, (b * groups,), values, warps),)
    block_c, block_s = config.channels, config.block // config.channels
    chunks, tile = blocks(pixels, block_s), {"BLOCK_C": block_c, "BLOCK_S": block_s}
    grid = (chunks, blocks(channels, block_c), b)
    partial = torch.empty((b, chunks, 2, channels), dtype=torch.float32, device=x.device)
    stats = torch.empty((b, groups, 2), dtype=torch.float32, device=x.device)
    shape = {"channels": channels, "pixels": pixels}
    first = {"x": Use(X), "partial": partial, "chunks": chunks} | x_strides | shape | tile
    width = min(1024, power(chunks * per_group))
    middle = {"partial": partial, "stats": stats, "chunks": chunks, "eps": eps, "BLOCK_S": block_s, "BLOCK": width}
    last = tensors | {"stats": stats, "channels": channels} | strides | sizes | flags | tile
    return (
        Stage(partial_kernel, grid, first, warps),
        Stage(combine_kernel, (b * groups,), middle | sizes, {"num_warps": 4}),
        Stage(apply_kernel, grid, last, warps),
    )


def decline(x: Tensor, *rest: Any) -> str | None:
    """Batches beyond the grid's third dimension and layouts without one stride for all pixels."""
    if x.shape[0] > 65535:
        return f"a batch of {x.shape[0]} is beyond the grid's third dimension (65535)"
    if x.numel() and spatial(x) is None:
        return f"the pixels of strides {tuple(x.stride()[2:])} have no single stride"
    return None


def small(x: Tensor, *rest: Any) -> Iterator[Config]:
    yield Config(False, 256, 16, 4) if x.dtype == torch.float16 else Config(False, 128, 4, 4)


def specimens() -> Iterator[Named]:
    for dtype, kind in SHORT.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            for shape in ((2, 320, 64, 64), (2, 1280, 8, 8)):
                x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
                args = (x, 32, meta(shape[1], dtype=dtype), meta(shape[1], dtype=dtype), 1e-5, "silu")
                where = "contiguous" if layout == torch.contiguous_format else "channels-last"
                yield f"{kind} {shape[1]}x{shape[2]}x{shape[3]} {where}", lambda args=args: args  # type: ignore[misc]


TUNABLE = Tunable("group_norm", Config, key, default, space, stages, Path(__file__), small)
KERNELS = [Kernel("group_norm.triton", "cuda", decline, TUNABLE.bind)]
