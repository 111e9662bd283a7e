"""Pixel shuffle on NVIDIA GPUs: both sides of a tile are read and written in the order of their memory.

Seen from the side with many channels (``packed``) and from that with many pixels (``spread``), a tile is the same
elements in another order; registers and shared memory turn one into the other.  Contiguous: R rows of pixels, one of
each channel j, are interleaved into one, (j, w) -> (w, j).  Channels-last: the channels (c, i, j) of a row of pixels
become those of R rows, (w, c, i, j) -> (i, w, j, c).
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

from fusegen.kernels.gpu.counting import cover, wide
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, power
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.op import Kernel, is_channels_last

X = 0  # its position in the schema


@triton.jit
def _count(N: tl.constexpr, WIDE: tl.constexpr):
    at = tl.arange(0, N)
    return at.to(tl.int64) if WIDE else at


@triton.jit
def rows_kernel(
    x, y, height, width, across, p_b, p_c, p_h, p_w, s_b, s_c, s_h, s_w,
    R: tl.constexpr, SIDE: tl.constexpr, DOWN: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS x BLOCK packed pixels of the R channels (c, i, j) of one c and i; height and width are the packed side's.

    SIDE is R as a power of two.
    """
    tile, plane, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    top, left = (tile // across * ROWS).to(tl.int64), (tile % across * BLOCK).to(tl.int64)
    packed, spread = (y, x) if DOWN else (x, y)
    packed += b * p_b + plane.to(tl.int64) * R * p_c + top * p_h + left * p_w
    spread += b * s_b + (plane // R).to(tl.int64) * s_c + (top * R + plane % R) * s_h + left * R * s_w
    rows, columns = tl.minimum(height - top, ROWS).to(tl.int32), tl.minimum(width - left, BLOCK).to(tl.int32)
    h, j, w = _count(ROWS, WIDE)[:, None, None], _count(SIDE, WIDE)[None, :, None], _count(BLOCK, WIDE)[None, None, :]
    packed += j * p_c + h * p_h + w * p_w
    here = (h < rows) & (j < R) & (w < columns)
    if SIDE == R:  # one long row, whose accesses are wide
        h, o = _count(ROWS, WIDE)[:, None], _count(BLOCK * SIDE, WIDE)[None, :]
        there = (h < rows) & (o < columns * R)
    else:
        j, w = _count(SIDE, WIDE)[None, None, :], _count(BLOCK, WIDE)[None, :, None]
        o = w * R + j
        there = (h < rows) & (j < R) & (w < columns)
    spread += h * (s_h * R) + o * s_w
    if DOWN:
        value = tl.reshape(tl.load(spread, mask=there), (ROWS, BLOCK, SIDE))
        tl.store(packed, tl.permute(value, (0, 2, 1)), mask=here)
    else:
        value = tl.permute(tl.load(packed, mask=here), (0, 2, 1))
        tl.store(spread, tl.reshape(value, spread.shape), mask=there)


@triton.jit
def pixels_kernel(
    x, y, width, across, p_b, p_h, s_b, s_h,
    C: tl.constexpr, R: tl.constexpr, SIDE: tl.constexpr, DOWN: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS packed pixels of a row, BLOCK of the C channels that remain of them on the spread side; both are dense."""
    tile, row, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    left, first = (tile // across * ROWS).to(tl.int64), tile % across * BLOCK
    packed, spread = (y, x) if DOWN else (x, y)
    packed += b * p_b + row * p_h + left * (C * R * R) + first * (R * R)
    spread += b * s_b + row * R * s_h + left * (R * C) + first
    columns, channels = tl.minimum(width - left, ROWS).to(tl.int32), tl.minimum(C - first, BLOCK)
    i, w = _count(SIDE, WIDE)[:, None, None, None], tl.arange(0, ROWS)[None, :, None, None]
    j, c = tl.arange(0, SIDE)[None, None, :, None], tl.arange(0, BLOCK)[None, None, None, :]
    spread += i * s_h + ((w * R + j) * C + c)
    there = (i < R) & (w < columns) & (j < R) & (c < channels)
    if SIDE == R:  # one long row, whose accesses are wide
        w, o = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK * R * R)[None, :]
        here = (w < columns) & (o < channels * (R * R))
    else:
        w, c = tl.arange(0, ROWS)[:, None, None, None], tl.arange(0, BLOCK)[None, :, None, None]
        i, j = tl.arange(0, SIDE)[None, None, :, None], tl.arange(0, SIDE)[None, None, None, :]
        o = (c * R + i) * R + j
        here = (w < columns) & (c < channels) & (i < R) & (j < R)
    packed += w * (C * R * R) + o
    if DOWN:
        value = tl.permute(tl.load(spread, mask=there), (1, 3, 0, 2))
        tl.store(packed, tl.reshape(value, packed.shape), mask=here)
    else:
        value = tl.reshape(tl.load(packed, mask=here), (ROWS, BLOCK, SIDE, SIDE))
        tl.store(spread, tl.permute(value, (2, 0, 3, 1)), mask=there)


@dataclass(frozen=True)
class Config:
    """``rows`` x ``block`` packed pixels, or pixels x channels where those are innermost, and the warps."""

    rows: int
    block: int
    num_warps: int


def _sides(x: Tensor, y: Tensor, down: bool) -> tuple[Tensor, Tensor]:
    """(packed, spread)."""
    return (y, x) if down else (x, y)


def _row(x: Tensor, factor: int, down: bool) -> tuple[int, int]:
    """How many elements go along ``block``, and how many each stands for in the tile."""
    if is_channels_last(x):
        return x.shape[1] if down else x.shape[1] // factor**2, power(factor) ** 2
    return x.shape[3] // factor if down else x.shape[3], power(factor)


def key(x: Tensor, factor: int, down: bool) -> str:
    """The length and kind of a row."""
    kind = f"{'down' if down else 'up'} {factor} {'last' if is_channels_last(x) else 'first'}"
    return f"{_row(x, factor, down)[0]} {kind} {x.element_size()}"


def _config(x: Tensor, factor: int, down: bool, elements: int, most: int, warps: int) -> Config:
    """A tile of about that many elements, at most ``most`` of them in a row."""
    length, each = _row(x, factor, down)
    block = cover(length, max(1, most // each))
    return Config(max(1, elements // (block * each)), block, warps)


def default(x: Tensor, factor: int, down: bool, limit: int = 0) -> Config:
    """2048 elements a program, 16 a thread."""
    return _config(x, factor, down, 2048, 2048, 4)


def space(x: Tensor, factor: int, down: bool) -> Iterator[Config]:
    for most in (256, 1024, 4096):
        for elements in (1024, 2048, 4096, 8192):
            for warps in (4, 8):
                if most <= elements and 8 <= elements // (32 * warps) <= 32:
                    yield _config(x, factor, down, elements, most, warps)


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """One launch."""
    x, factor, down = args
    if not x.numel():
        return ()
    packed, spread = _sides(x, outs[0], down)
    batch, channels, height, width = packed.shape
    last, (p, s), remain = is_channels_last(x), (packed.stride(), spread.stride()), channels // factor**2
    values: dict[str, Any] = {"x": Use(X), "y": outs[0], "width": width, "p_b": p[0], "p_h": p[2]}
    values |= {"s_b": s[0], "s_h": s[2], "R": factor, "SIDE": power(factor), "DOWN": down}
    values |= {"ROWS": config.rows, "BLOCK": config.block}
    if last:
        across = blocks(remain, config.block)
        values |= {"across": across, "C": remain, "WIDE": wide((factor, 2), (s[2], config.rows * factor * remain))}
        grid = (blocks(width, config.rows) * across, height, batch)
        return (Stage(pixels_kernel, grid, values, {"num_warps": config.num_warps}),)
    across, sizes = blocks(width, config.block), (factor, config.rows, config.block)
    values |= {"across": across, "height": height, "p_c": p[1], "p_w": p[3], "s_c": s[1], "s_w": s[3]}
    values["WIDE"] = wide(sizes, p[1:], (0, factor * s[2], factor * s[3]))
    grid = (blocks(height, config.rows) * across, remain * factor, batch)
    return (Stage(rows_kernel, grid, values, {"num_warps": config.num_warps}),)


def decline(x: Tensor, factor: int, down: bool) -> str | None:
    """Anything but four dimensions, and what is beyond the grid's second and third one."""
    if x.dim() != 4:
        return f"x has {x.dim()} dimensions, not 4"
    channels, height = (x.shape[1], x.shape[2] // factor) if down else (x.shape[1] // factor**2, x.shape[2])
    second = height if is_channels_last(x) else channels * factor
    if max(second, x.shape[0]) > 65535:
        return f"{second} {'rows' if is_channels_last(x) else 'planes'} of {x.shape[0]} samples are beyond a grid"
    return None


def small(*args: Any) -> Iterator[Config]:
    yield Config(4, 16, 1)


def specimens() -> Iterator[Named]:
    for dtype, kind in SHORT.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            for down in (False, True):
                x = torch.empty((1, 256, 256, 256), dtype=dtype, device="meta", memory_format=layout)
                where = "contiguous" if layout == torch.contiguous_format else "channels-last"
                yield f"{kind} {'down' if down else 'up'} 2 {where}", lambda x=x, down=down: (x, 2, down)  # type: ignore[misc]


TUNABLE = Tunable("pixel_shuffle", Config, key, default, space, stages, Path(__file__), small)
KERNELS = [Kernel("pixel_shuffle.triton", "cuda", decline, TUNABLE.bind)]
