"""Resampling on NVIDIA GPUs: one kernel in polyphase form, once for a filter (x, y), twice for a separable one.

A thread has one column (or, channels-last, some channels of it) and walks down: it reads each element that its rows of
outputs meet once for all of them and all their phases, which are known when it is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu.launch import ALIGNMENT, SHORT, Named, Stage, TritonLaunch, Use, blocks, power
from fusegen.kernels.op import Kernel, is_channels_last
from fusegen.kernels.upfirdn2d import Axis, axes

X, FILTER = 0, 1  # positions of the tensors in the schema


@triton.jit
def _element(x, columns, row, i: tl.constexpr, height, width, x_y, x_x, LOW_X: tl.constexpr):
    """Column ``columns`` + LOW_X + i of a row of x, 0 outside: an offset known when compiled, where x_x is 1, and one
    comparison an axis, as negative numbers are large."""
    met = (columns + (LOW_X + i)).to(tl.uint32) < tl.cast(width, tl.uint32)
    met = met & (row.to(tl.uint32) < tl.cast(height, tl.uint32))
    at = x + columns.to(tl.int64) * x_x + row.to(tl.int64) * x_y
    return tl.load(at + tl.cast(x_x, tl.int64) * (LOW_X + i), mask=met, other=0.0).to(tl.float32)


@triton.jit
def _tap(f, k_y: tl.constexpr, k_x: tl.constexpr, f_y, f_x, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr,
         FLIP: tl.constexpr, FILTER: tl.constexpr):  # fmt: skip
    if not FILTER:
        tap = 1.0
    elif FLIP:
        tap = tl.load(f + k_y * f_y + k_x * f_x).to(tl.float32)
    else:
        tap = tl.load(f + (TAPS_Y - 1 - k_y) * f_y + (TAPS_X - 1 - k_x) * f_x).to(tl.float32)
    return tap


@triton.jit
def _output(
    elements, taps, x, f, columns, top, height, width, x_y, x_x, f_y, f_x,
    r: tl.constexpr, phase_y: tl.constexpr, phase_x: tl.constexpr, UP_Y: tl.constexpr, UP_X: tl.constexpr,
    DOWN_Y: tl.constexpr, DOWN_X: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, BEFORE_Y: tl.constexpr,
    BEFORE_X: tl.constexpr, LOW_Y: tl.constexpr, LOW_X: tl.constexpr, SPAN: tl.constexpr, HELD: tl.constexpr,
    FLIP: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    """Output UP q + phase of both axes, q the ``r``-th row of the program's and the thread's column.

    Output o meets tap k where o DOWN + k - before is a multiple of UP; with o = UP q + phase that leaves one tap in
    every UP, from the same first one for all q, and element DOWN q + j + a constant for the j-th of them.
    """
    first_y: tl.constexpr = (BEFORE_Y - phase_y * DOWN_Y) % UP_Y
    first_x: tl.constexpr = (BEFORE_X - phase_x * DOWN_X) % UP_X
    at_y: tl.constexpr = r * DOWN_Y + (phase_y * DOWN_Y - BEFORE_Y + first_y) // UP_Y - LOW_Y
    at_x: tl.constexpr = (phase_x * DOWN_X - BEFORE_X + first_x) // UP_X - LOW_X
    acc = tl.zeros(columns.shape, tl.float32)
    for j in tl.static_range((TAPS_Y - first_y + UP_Y - 1) // UP_Y):
        for i in tl.static_range((TAPS_X - first_x + UP_X - 1) // UP_X):
            if HELD:
                tap = taps[(first_y + j * UP_Y) * TAPS_X + first_x + i * UP_X]
                acc += elements[(at_y + j) * SPAN + at_x + i] * tap
            else:
                row = top * DOWN_Y + (LOW_Y + at_y + j)
                one = _element(x, columns, row, at_x + i, height, width, x_y, x_x, LOW_X)
                acc += one * _tap(
                    f, first_y + j * UP_Y, first_x + i * UP_X, f_y, f_x, TAPS_Y, TAPS_X, FLIP, FILTER
                )  # fmt: skip
    return acc


@triton.jit
def resample_kernel(
    x, f, y, height, width, out_y, out_x, batch, channels, x_b, x_c, x_y, x_x, y_b, y_c, y_y, y_x, f_y, f_x, tiles_x,
    blocks_c, gain,
    UP_Y: tl.constexpr, UP_X: tl.constexpr, DOWN_Y: tl.constexpr, DOWN_X: tl.constexpr, TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr, BEFORE_Y: tl.constexpr, BEFORE_X: tl.constexpr, LOW_Y: tl.constexpr, LOW_X: tl.constexpr,
    SPAN_Y: tl.constexpr, SPAN: tl.constexpr, HELD: tl.constexpr, FLIP: tl.constexpr, FILTER: tl.constexpr,
    LAST: tl.constexpr, DEEP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """All phases of DEEP rows q: of COLS columns of ROWS planes, or where LAST of ROWS columns of COLS channels.

    LOW and SPAN: the first element that q = 0 meets, and how many from there on; HELD, they are kept in registers.
    """
    tile_x, tile_y = tl.program_id(0) % tiles_x, tl.program_id(0) // tiles_x
    a, e = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    if LAST:
        q_x, c = tile_x * ROWS + a, tl.program_id(1) % blocks_c * COLS + e
        b = tl.program_id(1) // blocks_c + c * 0
    else:
        q_x, plane = tile_x * COLS + e, tl.program_id(1) * ROWS + a
        b, c = plane // channels, plane % channels
    keep = (q_x * UP_X < out_x) & (b < batch) & (c < channels)
    x += b.to(tl.int64) * x_b + c.to(tl.int64) * x_c
    y += b.to(tl.int64) * y_b + c.to(tl.int64) * y_c
    columns = tl.where(keep, q_x * DOWN_X, -(2**30))  # what has no output reads nothing
    top = tile_y * DEEP + tl.zeros((1, 1), tl.int32)  # a tile: the interpreter's masks cannot be scalars
    elements, taps = (), ()
    if HELD:
        for k in tl.static_range(TAPS_Y * TAPS_X):
            taps += (_tap(f, k // TAPS_X, k % TAPS_X, f_y, f_x, TAPS_Y, TAPS_X, FLIP, FILTER),)  # type: ignore[assignment]
        for j in tl.static_range(SPAN_Y):
            row = top * DOWN_Y + (LOW_Y + j)
            for i in tl.static_range(SPAN):
                elements += (_element(x, columns, row, i, height, width, x_y, x_x, LOW_X),)  # type: ignore[assignment]
    for r in tl.static_range(DEEP):
        for phase_y in tl.static_range(UP_Y):
            o_y = (top + r) * UP_Y + phase_y
            line, below = y + o_y.to(tl.int64) * y_y, o_y < out_y
            if UP_X == 2 and not LAST:
                first = _output(
                    elements, taps, x, f, columns, top, height, width, x_y, x_x, f_y, f_x, r, phase_y, 0, UP_Y,
                    UP_X, DOWN_Y, DOWN_X, TAPS_Y, TAPS_X, BEFORE_Y, BEFORE_X, LOW_Y, LOW_X, SPAN, HELD, FLIP, FILTER,
                )  # fmt: skip
                second = _output(
                    elements, taps, x, f, columns, top, height, width, x_y, x_x, f_y, f_x, r, phase_y, 1, UP_Y,
                    UP_X, DOWN_Y, DOWN_X, TAPS_Y, TAPS_X, BEFORE_Y, BEFORE_X, LOW_Y, LOW_X, SPAN, HELD, FLIP, FILTER,
                )  # fmt: skip
                o_x = tile_x * (2 * COLS) + tl.arange(0, 2 * COLS)[None, :]
                out = (tl.interleave(first, second) * gain).to(y.dtype.element_ty)
                tl.store(line + o_x.to(tl.int64) * y_x, out, mask=(o_x < out_x) & below & (b < batch))
            else:
                for phase_x in tl.static_range(UP_X):
                    acc = _output(
                        elements, taps, x, f, columns, top, height, width, x_y, x_x, f_y, f_x, r, phase_y,
                        phase_x, UP_Y, UP_X, DOWN_Y, DOWN_X, TAPS_Y, TAPS_X, BEFORE_Y, BEFORE_X, LOW_Y, LOW_X, SPAN,
                        HELD, FLIP, FILTER,
                    )  # fmt: skip
                    o_x = q_x * UP_X + phase_x
                    out = (acc * gain).to(y.dtype.element_ty)
                    tl.store(line + o_x.to(tl.int64) * y_x, out, mask=keep & below & (o_x < out_x))


def _met(axis: Axis, deep: int) -> tuple[int, int]:
    """The first element that any phase of q = 0 meets, and how many from there on ``deep`` outputs q meet."""
    starts = []
    for phase in range(axis.up):
        base = phase * axis.down - axis.before
        first = -base % axis.up
        met = blocks(axis.taps - first, axis.up)
        starts.append(((base + first) // axis.up, met))
    low = min(start for start, _ in starts)
    return low, (deep - 1) * axis.down + max(start + met for start, met in starts) - low


def _deep(ax: Axis, ay: Axis, most: int) -> int:
    """Rows q a thread: as few as keep code and registers small; 0 where even one row's elements are too many."""
    for deep in (8, 4, 2, 1):
        held, products = _met(ay, deep)[1] * _met(ax, 1)[1], deep * ay.up * ax.up * ay.taps * ax.taps
        if held <= most and products // (ay.up * ax.up) <= 512 and ay.taps * ax.taps <= 48:
            return min(deep, power(blocks(ay.out, ay.up)))
    return 0


def _stage(
    x: Any, source: Tensor, f: Any, y: Tensor, along: Sequence[Axis], steps: Any, flip: bool, gain: float
) -> Stage:
    """One pass over ``along`` (x, y), from the tensor ``source`` (bound as ``x``) to ``y``; ``steps``: the filter's."""
    last, (ax, ay), (batch, channels) = is_channels_last(y), along, y.shape[:2]
    quarter_x, quarter_y = blocks(ax.out, ax.up), blocks(ay.out, ay.up)
    # A thread has 16 bytes of the channels, or one column, whose neighbours are not aligned.
    each = ALIGNMENT // source.element_size() if last else 1
    deep = _deep(ax, ay, 24 if last else 64)  # 72 spill on sm_80
    if last:
        cols = min(64, power(channels))
        rows = 128 * each // cols
        blocks_c = blocks(channels, cols)
        tiles_x, second = blocks(quarter_x, rows), batch * blocks_c
    else:
        cols = min(128, power(quarter_x))
        rows = 128 * each // cols
        blocks_c = 1
        tiles_x, second = blocks(quarter_x, cols), blocks(batch * channels, rows)
    names = ("b", "c", "y", "x")
    values: dict[str, Any] = {f"x_{n}": s for n, s in zip(names, source.stride(), strict=True)}
    values |= {f"y_{n}": s for n, s in zip(names, y.stride(), strict=True)}
    (low_y, span_y), (low_x, span) = _met(ay, max(deep, 1)), _met(ax, 1)
    values |= {
        "x": x, "f": x if f is None else f, "y": y, "height": ay.size, "width": ax.size, "out_y": ay.out,
        "out_x": ax.out, "batch": batch, "channels": channels, "f_y": steps[0], "f_x": steps[1], "tiles_x": tiles_x,
        "blocks_c": blocks_c, "gain": gain, "UP_Y": ay.up, "UP_X": ax.up, "DOWN_Y": ay.down, "DOWN_X": ax.down,
        "TAPS_Y": ay.taps, "TAPS_X": ax.taps, "BEFORE_Y": ay.before, "BEFORE_X": ax.before, "LOW_Y": low_y,
        "LOW_X": low_x, "SPAN_Y": span_y, "SPAN": span, "HELD": deep > 0, "FLIP": flip, "FILTER": f is not None,
        "LAST": last, "DEEP": max(deep, 1), "ROWS": rows, "COLS": cols,
    }  # fmt: skip
    grid = (tiles_x * blocks(quarter_y, max(deep, 1)), second)
    return Stage(resample_kernel, grid, values, {"num_warps": 4})


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> tuple[Stage, ...]:
    """One launch, or for a separable filter two, along x and then along y, with float32 between them."""
    x, filter, up, down, padding, flip, gain = args
    (y,) = outs
    if not y.numel():
        return ()
    ax, ay = axes(x, filter, up, down, padding)
    f = None if filter is None else Use(FILTER)
    if filter is None or filter.dim() == 2:
        steps = (0, 0) if filter is None else filter.stride()
        return (_stage(Use(X), x, f, y, (ax, ay), steps, flip, gain),)
    if not x.numel():  # nothing but padding: one pass of the outer product's first row and column is as good
        return (_stage(Use(X), x, None, y, (ax, ay), (0, 0), flip, gain),)
    layout = torch.channels_last if is_channels_last(y) else torch.contiguous_format
    shape = (*x.shape[:2], ay.size, ax.out)
    between = torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=layout)
    level_y, level_x = Axis(ay.size, ay.size, 1, 1, 0, 1), Axis(ax.out, ax.out, 1, 1, 0, 1)
    step = (0, filter.stride(0))
    return (
        _stage(Use(X), x, f, between, (ax, level_y), step, flip, 1.0),
        _stage(between, between, f, y, (level_x, ay), step[::-1], flip, gain),
    )


def decline(x: Tensor, filter: Tensor | None, *rest: Any) -> str | None:
    """More planes than a grid's second dimension holds; filters whose taps no program should unroll."""
    ax, ay = axes(x, filter, *rest)
    planes = x.shape[0] * (blocks(x.shape[1], 64) if is_channels_last(x) else x.shape[1])
    if planes > 65535:
        return f"{planes} planes are beyond the grid's second dimension (65535)"
    met = [blocks(a.taps, a.up) for a in (ax, ay)]
    count = max(met) if filter is None or filter.dim() == 1 else met[0] * met[1]
    return f"an output meets {count} taps (limit 256)" if count > 256 else None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> TritonLaunch:
    return TritonLaunch(args, stages(outs, args))


def specimens() -> Iterator[Named]:
    two, four = torch.empty(4, 4, device="meta"), torch.empty(12, device="meta")
    for dtype, kind in SHORT.items():
        for last in (False, True):
            layout = torch.channels_last if last else torch.contiguous_format
            x = torch.empty(4, 64, 256, 256, dtype=dtype, device="meta", memory_format=layout)
            where = " channels-last" if last else ""
            yield f"{kind} up2{where}", lambda x=x: (x, two, [2, 2], [1, 1], [2, 1, 2, 1], False, 4.0)  # type: ignore[misc]
            yield f"{kind} down2{where}", lambda x=x: (x, two, [1, 1], [2, 2], [1] * 4, False, 1.0)  # type: ignore[misc]
            yield f"{kind} up2 sinc12{where}", lambda x=x: (x, four, [2, 2], [1, 1], [6, 5, 6, 5], False, 4.0)  # type: ignore[misc]


KERNELS = [Kernel("upfirdn2d.triton", "cuda", decline, bind)]
