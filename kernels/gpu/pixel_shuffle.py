"""Pixel shuffle on NVIDIA GPUs: each output element is fetched from where it stands.

The output is written in the order of its memory: rows of W pixels where it is contiguous, rows of C channels where it
is channels-last.  What a row reads lies in ``factor`` or ``factor^2`` streams, each of them in order, so that every
sector that is fetched is used.
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

from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, power
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.op import Kernel, is_channels_last

X = 0  # its position in the schema


@triton.jit
def pixel_shuffle_kernel(
    x, y, x_b, x_c, x_h, x_w, rows, channels, height, width,
    R: tl.constexpr, DOWN: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of y, BLOCK elements of each; channels, height and width are y's, row is (b, c, h) or (b, h, w)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inner = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if LAST:
        w, h, b, c, length = row % width, row // width % height, row // width // height, inner, channels
    else:
        w, h, b, c, length = inner, row % height, row // height // channels, row // height % channels, width
    if DOWN:
        j, i = c % R, c // R % R
        at = c // (R * R) * x_c + (h * R + i) * x_h + (w * R + j) * x_w
    else:
        at = ((c * R + h % R) * R + w % R) * x_c + h // R * x_h + w // R * x_w
    keep = (row < rows) & (inner < length)
    tl.store(y + row * length + inner, tl.load(x + b * x_b + at, mask=keep), mask=keep)


@dataclass(frozen=True)
class Config:
    """A tile of y, ``rows`` x ``block``, and its warps."""

    rows: int
    block: int
    num_warps: int


def _row(x: Tensor, factor: int, down: bool) -> int:
    """Elements in a row of the output."""
    size = x.shape[1] if is_channels_last(x) else x.shape[3]
    if is_channels_last(x):
        return size * factor**2 if down else size // factor**2
    return size // factor if down else size * factor


def key(x: Tensor, factor: int, down: bool) -> str:
    """The length and kind of a row."""
    kind = f"{'down' if down else 'up'} {factor} {'last' if is_channels_last(x) else 'first'}"
    return f"{_row(x, factor, down)} {kind} {x.element_size()}"


def default(x: Tensor, factor: int, down: bool, limit: int = 0) -> Config:
    """2048 elements a program."""
    block = min(1024, power(_row(x, factor, down)))
    return Config(2048 // block, block, 4)


def space(x: Tensor, factor: int, down: bool) -> Iterator[Config]:
    widest = power(_row(x, factor, down))
    for block in sorted({min(widest, b) for b in (64, 256, 1024)}):
        for elements in (1024, 2048, 4096):
            for warps in (4, 8):
                yield Config(max(1, elements // block), block, warps)


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """One launch."""
    x, factor, down = args
    (y,) = outs
    length = _row(x, factor, down)
    if not x.numel():
        return ()
    values = {
        "x": Use(X),
        "y": y,
        "x_b": x.stride(0),
        "x_c": x.stride(1),
        "x_h": x.stride(2),
        "x_w": x.stride(3),
        "rows": y.numel() // length,
        "channels": y.shape[1],
        "height": y.shape[2],
        "width": y.shape[3],
        "R": factor,
        "DOWN": down,
        "LAST": is_channels_last(x),
        "ROWS": config.rows,
        "BLOCK": config.block,
    }
    grid = (blocks(y.numel() // length, config.rows), blocks(length, config.block))
    return (Stage(pixel_shuffle_kernel, grid, values, {"num_warps": config.num_warps}),)


def decline(x: Tensor, factor: int, down: bool) -> str | None:
    """Anything but four dimensions, and rows beyond the grid."""
    if x.dim() != 4:
        return f"x has {x.dim()} dimensions, not 4"
    if x.numel() and _row(x, factor, down) > 2**20:
        return f"a row of {_row(x, factor, down)} elements is longer than 2^20"
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
