"""Resampling on NVIDIA GPUs: one kernel in polyphase form, once for a filter (x, y), twice for a separable one.

A program holds one tile of one or more planes.  The phases along x are its accumulators, which share what they read and
are interleaved before one wide store; the phase along y is the program's own.  Channels-last tensors are the same with
channels in the place of columns, whose phase is then the program's own too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu.launch import SHORT, Named, Stage, TritonLaunch, Use, blocks, power
from fusegen.kernels.op import Kernel, is_channels_last
from fusegen.kernels.upfirdn2d import Axis, axes

X, FILTER = 0, 1  # positions of the tensors in the schema


@triton.jit
def _phase(
    x, f, acc, rows, cols, keep, height, width, x_y, x_x, f_y, f_x, phase_y, phase_x, before_y, before_x,
    UP_Y: tl.constexpr, UP_X: tl.constexpr, DOWN_Y: tl.constexpr, DOWN_X: tl.constexpr, TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr, FLIP: tl.constexpr, FILTER: tl.constexpr,
):  # fmt: skip
    """Outputs UP q + phase of both axes for the tile of q's ``rows`` and ``cols``.

    Output o meets tap k where o DOWN + k - before is a multiple of UP; with o = UP q + phase that leaves one tap in
    every UP, from the same first one for all q, and element DOWN q + j + a constant for the j-th of them.
    """
    base_y, base_x = phase_y * DOWN_Y - before_y + UP_Y * 65536, phase_x * DOWN_X - before_x + UP_X * 65536
    first_y, first_x = (UP_Y - base_y % UP_Y) % UP_Y, (UP_X - base_x % UP_X) % UP_X
    at_y = rows * DOWN_Y + ((base_y + first_y) // UP_Y - 65536)
    at_x = cols * DOWN_X + ((base_x + first_x) // UP_X - 65536)
    for j in tl.static_range((TAPS_Y + UP_Y - 1) // UP_Y):
        k_y = first_y + j * UP_Y
        y = at_y + j
        inside = keep & (y >= 0) & (y < height)
        row = x + y.to(tl.int64) * x_y
        for i in tl.static_range((TAPS_X + UP_X - 1) // UP_X):
            k_x = first_x + i * UP_X
            col = at_x + i
            met = inside & (col >= 0) & (col < width)
            value = tl.load(row + col * x_x, mask=met, other=0.0).to(tl.float32)
            if FILTER:
                kept = (k_y < TAPS_Y) & (k_x < TAPS_X)
                where = k_y * f_y + k_x * f_x if FLIP else (TAPS_Y - 1 - k_y) * f_y + (TAPS_X - 1 - k_x) * f_x
                acc += value * tl.where(kept, tl.load(f + tl.where(kept, where, 0)).to(tl.float32), 0.0)
            else:
                acc += tl.where((k_y < TAPS_Y) & (k_x < TAPS_X), value, 0.0)
    return acc


@triton.jit
def planes_kernel(
    x, f, y, height, width, out_y, out_x, channels, x_b, x_c, x_y, x_x, y_b, y_c, y_y, y_x, f_y, f_x,
    before_y, before_x, tiles_y, tiles_x, gain,
    UP_Y: tl.constexpr, UP_X: tl.constexpr, DOWN_Y: tl.constexpr, DOWN_X: tl.constexpr, TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr, FLIP: tl.constexpr, FILTER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS x (UP_X COLS) outputs of one plane, of one phase along y."""
    pid, plane = tl.program_id(0), tl.program_id(1)
    tile_x, rest = pid % tiles_x, pid // tiles_x
    tile_y, phase_y = rest % tiles_y, rest // tiles_y
    b, c = (plane // channels).to(tl.int64), (plane % channels).to(tl.int64)
    x += b * x_b + c * x_c
    y += b * y_b + c * y_c
    q_y = tile_y * ROWS + tl.arange(0, ROWS)[:, None]
    q_x = tile_x * COLS + tl.arange(0, COLS)[None, :]
    keep = q_y * UP_Y + phase_y < out_y
    line = y + (q_y * UP_Y + phase_y).to(tl.int64) * y_y
    zero = tl.zeros((ROWS, COLS), tl.float32)
    if UP_X == 2:
        a0 = _phase(
            x, f, zero, q_y, q_x, keep, height, width, x_y, x_x, f_y, f_x, phase_y, 0, before_y, before_x,
            UP_Y, UP_X, DOWN_Y, DOWN_X, TAPS_Y, TAPS_X, FLIP, FILTER,
        )  # fmt: skip
        a1 = _phase(
            x, f, zero, q_y, q_x, keep, height, width, x_y, x_x, f_y, f_x, phase_y, 1, before_y, before_x,
            UP_Y, UP_X, DOWN_Y, DOWN_X, TAPS_Y, TAPS_X, FLIP, FILTER,
        )  # fmt: skip
        o_x = tile_x * (2 * COLS) + tl.arange(0, 2 * COLS)[None, :]
        out = (tl.interleave(a0, a1) * gain).to(y.dtype.element_ty)
        tl.store(line + o_x * y_x, out, mask=keep & (o_x < out_x))
    else:
        for phase_x in range(UP_X):
            acc = _phase(
                x, f, zero, q_y, q_x, keep, height, width, x_y, x_x, f_y, f_x, phase_y, phase_x, before_y, before_x,
                UP_Y, UP_X, DOWN_Y, DOWN_X, TAPS_Y, TAPS_X, FLIP, FILTER,
            )  # fmt: skip
            o_x = q_x * UP_X + phase_x
            tl.store(line + o_x * y_x, (acc * gain).to(y.dtype.element_ty), mask=keep & (o_x < out_x))


@triton.jit
def pixels_kernel(
    x, f, y, height, width, out_y, out_x, channels, x_b, x_c, x_y, x_x, y_b, y_c, y_y, y_x, f_y, f_x,
    before_y, before_x, tiles_y, tiles_x, gain,
    UP_Y: tl.constexpr, UP_X: tl.constexpr, DOWN_Y: tl.constexpr, DOWN_X: tl.constexpr, TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr, FLIP: tl.constexpr, FILTER: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Channels innermost: ROWS outputs of one row and of one phase along x, by COLS channels; tiles_y is the batch."""
    pid, o_y = tl.program_id(0), tl.program_id(1)
    tile_x, rest = pid % tiles_x, pid // tiles_x
    blocks_c = (channels + COLS - 1) // COLS
    block_c, rest = rest % blocks_c, rest // blocks_c
    phase_x, b = rest % UP_X, (rest // UP_X).to(tl.int64)
    c = block_c * COLS + tl.arange(0, COLS)[None, :]
    q_x = tile_x * ROWS + tl.arange(0, ROWS)[:, None]
    o_x = q_x * UP_X + phase_x
    keep = (c < channels) & (o_x < out_x)
    q_y = o_y // UP_Y + tl.zeros((1, 1), tl.int32)  # a tile: the interpreter's masks cannot be scalars
    acc = _phase(
        x + b * x_b + c * x_c, f, tl.zeros((ROWS, COLS), tl.float32), q_y, q_x, keep, height, width, x_y, x_x,
        f_y, f_x, o_y % UP_Y, phase_x, before_y, before_x, UP_Y, UP_X, DOWN_Y, DOWN_X, TAPS_Y, TAPS_X, FLIP, FILTER,
    )  # fmt: skip
    line = y + b * y_b + o_y.to(tl.int64) * y_y + c * y_c
    tl.store(line + o_x * y_x, (acc * gain).to(y.dtype.element_ty), mask=keep)


def _stage(
    x: Any, source: Tensor, f: Any, y: Tensor, along: Sequence[Axis], steps: Any, flip: bool, gain: float
) -> Stage:
    """One pass over ``along`` (x, y), from the tensor ``source`` (bound as ``x``) to ``y``; ``steps``: the filter's."""
    last = is_channels_last(y)
    ax, ay = along
    quarter_x, quarter_y = blocks(ax.out, ax.up), blocks(ay.out, ay.up)
    batch, channels = y.shape[:2]
    if last:
        cols = min(64, power(channels))
        rows = min(max(1024 // cols, 1), power(quarter_x))
        tiles_x, tiles_y = blocks(quarter_x, rows), batch
        grid = (tiles_x * blocks(channels, cols) * ax.up * batch, ay.out)
    else:
        cols = min(128, power(quarter_x))
        rows = min(1024 // cols, power(quarter_y))
        tiles_x, tiles_y = blocks(quarter_x, cols), blocks(quarter_y, rows)
        grid = (tiles_x * tiles_y * ay.up, batch * channels)
    names = ("b", "c", "y", "x")
    values: dict[str, Any] = {f"x_{n}": s for n, s in zip(names, source.stride(), strict=True)}
    values |= {f"y_{n}": s for n, s in zip(names, y.stride(), strict=True)}
    values |= {
        "x": x, "f": x if f is None else f, "y": y, "height": ay.size, "width": ax.size, "out_y": ay.out,
        "out_x": ax.out, "channels": channels, "f_y": steps[0], "f_x": steps[1], "before_y": ay.before,
        "before_x": ax.before, "tiles_y": tiles_y, "tiles_x": tiles_x, "gain": gain, "UP_Y": ay.up, "UP_X": ax.up,
        "DOWN_Y": ay.down, "DOWN_X": ax.down, "TAPS_Y": ay.taps, "TAPS_X": ax.taps, "FLIP": flip,
        "FILTER": f is not None, "ROWS": rows, "COLS": cols,
    }  # fmt: skip
    # Two phases of many taps at once take more registers than ptxas gives four warps on an sm_100.
    many = not last and ax.up == 2 and blocks(ax.taps, ax.up) * blocks(ay.taps, ay.up) > 4
    return Stage(pixels_kernel if last else planes_kernel, grid, values, {"num_warps": 8 if many else 4})


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
    """More planes or rows than a grid's second dimension holds; filters whose taps no program should unroll."""
    ax, ay = axes(x, filter, *rest)
    rows = ay.out if is_channels_last(x) else x.shape[0] * x.shape[1]
    if rows > 65535:
        return f"{rows} rows or planes are beyond the grid's second dimension (65535)"
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
