"""filtered_lrelu with filters (y, x): tiles on the matrix units, the upsampled picture only ever in registers.

A filter along one axis, upsampling or downsampling included, is a banded matrix, and the same one for every tile that
starts at the same phase.  So a tile is U = sum_k Y_k X W_k, the leaky ReLU, and D = sum_k B_k U C_k on the matrix
units: one term for a separable filter, one a row for a filter (y, x).  A first launch writes the matrices.  An infinity
or NaN in x spreads over its tile (0 times infinity), not only over the filters' reach.  Products are of
three tf32 each, whose error is near float32's: of one each, four in a row were too coarse for bfloat16 on an H200.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu.launch import Stage, blocks, power
from fusegen.kernels.upfirdn2d import Axis

TILES = (32, 64)  # upsampled elements of a tile along an axis, and the most input elements: float32's, and others'
OUT = 32  # the most outputs
SMALLEST = 16  # tl.dot's least extent


@triton.jit
def matrices_kernel(
    f, y, x, first_y, first_x, taps_y, taps_x, f_y, f_x, gain,
    STEP: tl.constexpr, LONG: tl.constexpr, SHORT: tl.constexpr, UP: tl.constexpr, FILTER: tl.constexpr,
    SEPARABLE: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """Term k of a filter: y (k, out, in) for rows and x (k, in, out) for columns, scaled by ``gain``.

    UP: an upsampling, (out, in) = (LONG, SHORT), where output m meets input i by tap STEP i + first - m.  Else a
    downsampling, (SHORT, LONG), by tap m - STEP o.  A row filter's term takes its row's one tap along y.
    """
    k = tl.program_id(0)
    long, short = tl.arange(0, LONG)[:, None], tl.arange(0, SHORT)[None, :]
    tap_y = STEP * short + first_y - long if UP else long - STEP * short
    tap_x = STEP * short + first_x - long if UP else long - STEP * short
    in_y, in_x = (tap_y >= 0) & (tap_y < taps_y), (tap_x >= 0) & (tap_x < taps_x)
    if not FLIP:  # a convolution meets the filter from its end
        tap_x = taps_x - 1 - tap_x
    along_y = tl.where(in_y, 1.0, 0.0)
    along_x = tl.where(in_x, 1.0, 0.0)
    if FILTER and SEPARABLE:
        tap_y = tap_y if FLIP else taps_y - 1 - tap_y
        along_y = tl.load(f + tap_y * f_x, mask=in_y, other=0.0).to(tl.float32)
        along_x = tl.load(f + tap_x * f_x, mask=in_x, other=0.0).to(tl.float32)
    elif FILTER:
        row = k if FLIP else taps_y - 1 - k
        along_y = tl.where(tap_y == k, 1.0, 0.0)
        along_x = tl.load(f + row * f_y + tap_x * f_x, mask=in_x, other=0.0).to(tl.float32)
    along_x *= gain
    y += k * LONG * SHORT
    x += k * LONG * SHORT
    if UP:
        tl.store(y + long * SHORT + short, along_y)
        tl.store(x + short * LONG + long, along_x)
    else:
        tl.store(y + short * LONG + long, along_y)
        tl.store(x + long * SHORT + short, along_x)


@triton.jit
def filtered_lrelu_kernel(
    x, bias, out, up_y, up_x, down_y, down_x, channels, height, width, out_h, out_w, x_b, x_c, x_y, x_x,
    y_b, y_c, y_y, y_x, step_y, step_x, first_y, first_x, count_y, count_x, tiles_x, gain, slope, clamp,
    UPS: tl.constexpr, DOWNS: tl.constexpr, BIAS: tl.constexpr, CLAMP: tl.constexpr, IN: tl.constexpr,
    LONG: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """count_y x count_x outputs of one plane; tile t reads IN inputs from step t + first on, along each axis."""
    tile_x, tile_y = tl.program_id(0) % tiles_x, tl.program_id(0) // tiles_x
    near_i, near_l, near_o = tl.arange(0, IN), tl.arange(0, LONG), tl.arange(0, OUT)
    row, col = tile_y * step_y + first_y + near_i[:, None], tile_x * step_x + first_x + near_i[None, :]
    inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
    reads = row.to(tl.int64) * x_y + col.to(tl.int64) * x_x
    o_y, o_x = tile_y * count_y + near_o[:, None], tile_x * count_x + near_o[None, :]
    writes = o_y.to(tl.int64) * y_y + o_x.to(tl.int64) * y_x
    ours = (near_o[:, None] < count_y) & (near_o[None, :] < count_x) & (o_y < out_h) & (o_x < out_w)
    b, c = (tl.program_id(1) // channels).to(tl.int64), (tl.program_id(1) % channels).to(tl.int64)
    tile = tl.load(x + b * x_b + c * x_c + reads, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        tile = tl.where(inside, tile + tl.load(bias + c).to(tl.float32), 0.0)  # what is padded has no bias
    high = tl.zeros((LONG, LONG), tl.float32)
    for k in range(UPS):
        left = tl.load(up_y + k * LONG * IN + near_l[:, None] * IN + near_i[None, :])
        right = tl.load(up_x + k * LONG * IN + near_i[:, None] * LONG + near_l[None, :])
        part = tl.dot(left, tile, input_precision="tf32x3")
        high = tl.dot(part, right, high, input_precision="tf32x3")
    high = tl.where(high < 0.0, high * slope, high) * gain
    if CLAMP:
        high = tl.where(high > clamp, clamp, tl.where(high < -clamp, -clamp, high))  # NaN stays
    low = tl.zeros((OUT, OUT), tl.float32)
    for k in range(DOWNS):
        left = tl.load(down_y + k * OUT * LONG + near_o[:, None] * LONG + near_l[None, :])
        right = tl.load(down_x + k * OUT * LONG + near_l[:, None] * OUT + near_o[None, :])
        part = tl.dot(left, high, input_precision="tf32x3")
        low = tl.dot(part, right, low, input_precision="tf32x3")
    tl.store(out + b * y_b + c * y_c + writes, low.to(out.dtype.element_ty), mask=ours)


@dataclass(frozen=True)
class Tiling:
    """Tiles along one axis: ``count`` outputs each, ``step`` inputs apart, reading ``needs`` inputs from ``first`` on.

    Tap ``up`` i + ``phase`` - m joins input i of a tile to upsampled element m of it.
    """

    count: int
    step: int
    needs: int
    first: int
    phase: int


def tiling(rise: Axis, fall: Axis, tile: int) -> Tiling | None:
    """The tiles of one axis with ``tile`` upsampled elements, or None where no output fits into one."""
    up, down = rise.up, fall.down
    first = -rise.before // up
    phase = up * first + rise.before
    room = min(tile, (tile - 1) * up - rise.taps + 2 + phase)  # upsampled elements whose inputs fit
    unit = up // math.gcd(up, down)  # so that every tile starts at a multiple of up
    count = min(OUT, (room - fall.taps) // down + 1) // unit * unit if room >= fall.taps else 0
    if count < 1:
        return None
    used = (count - 1) * down + fall.taps
    return Tiling(count, count * down // up, (rise.taps - 1 + used - 1 - phase) // up + 1, first, phase)


def tilings(along: tuple[tuple[Axis, Axis], tuple[Axis, Axis]]) -> tuple[int, Tiling, Tiling] | None:
    """The size of a tile and the tilings of the axes x and y, or None where the filters leave no tile an output.

    Three products of tf32 for one of float32 need the registers of several: tiles are as small as they can be.
    """
    for tile in TILES:
        found = [tiling(*pair, tile) for pair in along]
        if found[0] is not None and found[1] is not None:
            return tile, found[0], found[1]
    return None


def _matrices(f: Any, filter: Tensor | None, target: Any, rises: Any, tiles: Any, gain: float, flip: bool) -> Stage:
    """The launch that fills ``target`` (y, x) with a filter's terms; ``rises``: the axes x and y of one resampling."""
    ax, ay = rises
    up = tiles is not None
    long, short = (target[0].shape[1:]) if up else (target[0].shape[1:][::-1])
    separable = filter is not None and filter.dim() == 1
    strides = (0, 0) if filter is None else (0, filter.stride(0)) if separable else filter.stride()
    values = {
        "f": target[0] if filter is None else f, "y": target[0], "x": target[1],
        "first_y": tiles[1].phase if up else 0, "first_x": tiles[0].phase if up else 0, "taps_y": ay.taps,
        "taps_x": ax.taps, "f_y": strides[0], "f_x": strides[1], "gain": gain, "STEP": ax.up if up else ax.down,
        "LONG": long, "SHORT": short, "UP": up, "FILTER": filter is not None, "SEPARABLE": separable, "FLIP": flip,
    }  # fmt: skip
    return Stage(matrices_kernel, (target[0].shape[0],), values, {"num_warps": 8})


def _terms(filter: Tensor | None) -> int:
    return filter.shape[0] if filter is not None and filter.dim() == 2 else 1


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], along: Any, given: tuple[Any, ...]) -> tuple[Stage, ...]:
    """Two launches for the filters' matrices, one for the rest; ``along``: the axes x and y, ``given``: what stands for
    x, the filters and the bias."""
    x, up_filter, down_filter, bias, up, _, _, gain, slope, clamp, flip = args
    (y,) = outs
    (rise_x, fall_x), (rise_y, fall_y) = along
    chosen = tilings(along)
    assert chosen is not None
    long, *tiles = chosen
    size = max(SMALLEST, power(max(t.needs for t in tiles)))
    most = max(SMALLEST, power(max(t.count for t in tiles)))
    make = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)  # noqa: E731
    ups, downs = _terms(up_filter), _terms(down_filter)
    up_to, down_to = (make(ups, long, size), make(ups, size, long)), (make(downs, most, long), make(downs, long, most))
    names = ("b", "c", "y", "x")
    values = {f"x_{n}": s for n, s in zip(names, x.stride(), strict=True)}
    values |= {f"y_{n}": s for n, s in zip(names, y.stride(), strict=True)}
    planes, tiles_x = x.shape[0] * x.shape[1], blocks(y.shape[3], tiles[0].count)
    values |= {
        "x": given[0], "bias": given[3], "out": y, "up_y": up_to[0], "up_x": up_to[1],
        "down_y": down_to[0], "down_x": down_to[1], "channels": x.shape[1], "height": x.shape[2],
        "width": x.shape[3], "out_h": y.shape[2], "out_w": y.shape[3], "step_y": tiles[1].step, "step_x": tiles[0].step,
        "first_y": tiles[1].first, "first_x": tiles[0].first, "count_y": tiles[1].count, "count_x": tiles[0].count,
        "tiles_x": tiles_x, "gain": gain, "slope": slope, "clamp": 0.0 if clamp is None else clamp, "UPS": ups,
        "DOWNS": downs, "BIAS": bias is not None, "CLAMP": clamp is not None, "IN": size, "LONG": long, "OUT": most,
    }  # fmt: skip
    grid = (tiles_x * blocks(y.shape[2], tiles[1].count), planes)
    return (
        _matrices(given[1], up_filter, up_to, (rise_x, rise_y), tiles, float(up * up), flip),
        _matrices(given[2], down_filter, down_to, (fall_x, fall_y), None, 1.0, flip),
        Stage(filtered_lrelu_kernel, grid, values, {"num_warps": 4 if long == TILES[0] else 8}),
    )


def decline(x: Tensor, along: tuple[tuple[Axis, Axis], tuple[Axis, Axis]]) -> str | None:
    """Filters that leave a tile no output, and more planes than a grid's second dimension holds."""
    if tilings(along) is None:
        taps = ", ".join(f"{rise.taps} and {fall.taps} along {n}" for n, (rise, fall) in zip("xy", along))  # noqa: B905
        return f"filters of {taps} leave a tile of {TILES[-1]} no output"
    planes = x.shape[0] * x.shape[1]
    return f"{planes} planes are beyond the grid's second dimension (65535)" if planes > 65535 else None
