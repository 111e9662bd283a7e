"""filtered_lrelu by filters along one axis: two launches, the upsampled picture only ever in a thread's registers.

Along an axis, upsampled element UP q + p, p its phase, meets one tap in every UP, from the same first one for all q.
The filters along x and y may change places, the leaky ReLU between them may not: so a thread of the first launch has
one q, makes all phases of it along x from the elements of x beside it, walks down, and keeps what the rows it has met
add to the outputs along y that are not done yet.  What it writes is upsampled along x alone; the second launch
downsamples that along x.
"""

# mypy: disable-error-code="assignment, var-annotated"
# Triton's tuples grow in unrolled loops, which a type of Python's does not.
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu.launch import Stage, blocks
from fusegen.kernels.op import is_channels_last
from fusegen.kernels.upfirdn2d import Axis

LANES = 128  # of a program of the first launch: a thread each
ROWS = 12  # upsampled rows of one round of its loop, at least: its code, and that few values change registers behind it
LONGEST = 16  # and at most
PROCESSORS = 132  # of an H200
REGISTERS = 65536  # of a processor
HELD = 96  # numbers that live across the loop at most, the taps among them: what those registers leave


@triton.jit
def _taps(f, step, gain, TAPS: tl.constexpr, FLIP: tl.constexpr, FILTER: tl.constexpr):
    """A filter's taps as a correlation has them, times ``gain``; the one tap 1 where there is no filter."""
    taps = ()
    for k in tl.static_range(TAPS):
        if FILTER:
            taps += (tl.load(f + (k if FLIP else TAPS - 1 - k) * step).to(tl.float32) * gain,)  # type: ignore[assignment]
        else:
            taps += (1.0 * gain,)  # type: ignore[assignment]
    return taps


@triton.jit
def _upsampled(
    acc, elements, taps, v: tl.constexpr, column: tl.constexpr, COLUMNS: tl.constexpr, UP: tl.constexpr,
    TAPS: tl.constexpr, BEFORE: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """``acc`` and upsampled element ``v``, of one of the COLUMNS numbers of each element: the first of these is LOW."""
    first: tl.constexpr = (BEFORE - v) % UP
    start: tl.constexpr = (v - BEFORE + first) // UP - LOW
    for j in tl.static_range((TAPS - first + UP - 1) // UP):
        acc += elements[(start + j) * COLUMNS + column] * taps[first + j * UP]
    return acc


@triton.jit
def _across(
    at, near, row, height, width, x_x, taps, bias,
    UP: tl.constexpr, TAPS: tl.constexpr, BEFORE: tl.constexpr, LOW: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """All phases along x of one row: SPAN elements from ``at`` on, in the columns ``near``; ``bias``: what the bias
    adds to each phase.  One comparison tells whether an element is there, as negative numbers are large."""
    met = (row >= 0) & (row < height)
    end = tl.where(met, width, 0).to(tl.uint32)
    elements, phases = (), ()
    for i in tl.static_range(SPAN):
        one = tl.load(at + tl.cast(x_x, tl.int64) * i, mask=near[i] < end, other=0.0)
        elements += (one.to(tl.float32),)  # type: ignore[assignment]
    for p in tl.static_range(UP):
        acc = _upsampled(bias[p], elements, taps, p, 0, 1, UP, TAPS, BEFORE, LOW)
        phases += (tl.where(met, acc, 0.0),)  # type: ignore[assignment]  # what is padded has no bias
    return phases


@triton.jit
def columns_kernel(
    x, up_filter, down_filter, bias, between, channels, height, width, columns, lanes, out_y, rounds, deep,
    x_b, x_c, x_y, x_x, up_step, down_step, gain, slope, clamp,
    UP: tl.constexpr, DOWN: tl.constexpr, UP_TAPS: tl.constexpr, DOWN_TAPS: tl.constexpr, BEFORE_Y: tl.constexpr,
    BEFORE_X: tl.constexpr, LOW_Y: tl.constexpr, LOW_X: tl.constexpr, SPAN_Y: tl.constexpr, SPAN_X: tl.constexpr,
    ROWS: tl.constexpr, FLIP: tl.constexpr, UP_FILTER: tl.constexpr, DOWN_FILTER: tl.constexpr, BIAS: tl.constexpr,
    CLAMP: tl.constexpr, LAST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``deep`` rows of outputs along y, of LANES of the ``columns`` q of all planes; LAST: channel by channel.

    ``between`` is (plane, row, phase, q), or where LAST (sample, row, phase, q, channel).  A round of the loop takes
    ROWS upsampled rows, and holds the KEPT rows before its own that these meet, and what was added to PENDING outputs.
    """
    NEW: tl.constexpr = ROWS // UP
    KEPT: tl.constexpr = SPAN_Y - NEW
    PENDING: tl.constexpr = (DOWN_TAPS - 1) // DOWN
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    keep = lane < lanes
    if LAST:
        c, q, b = lane % channels, lane // channels % columns, lane // channels // columns
        to = between + b.to(tl.int64) * out_y * (UP * columns * channels) + q * channels + c
        pitch = columns * channels
    else:
        q, plane = lane % columns, lane // columns
        b, c = plane // channels, plane % channels
        to = between + plane.to(tl.int64) * out_y * (UP * columns) + q
        pitch = columns
    up_taps = _taps(up_filter, up_step, UP * 1.0, UP_TAPS, FLIP, UP_FILTER)
    down_taps = _taps(down_filter, down_step, 1.0, DOWN_TAPS, FLIP, DOWN_FILTER)
    zero = tl.zeros((LANES,), tl.float32)
    own = tl.load(bias + c, mask=keep, other=0.0).to(tl.float32) if BIAS else zero
    near, biases, added = (), (), ()
    for i in tl.static_range(SPAN_X):
        near += (tl.where(keep, q + (LOW_X + i), -1).to(tl.uint32),)  # type: ignore[assignment]
        biases += (tl.where(near[i] < tl.cast(width, tl.uint32), own, 0.0),)  # type: ignore[assignment]
    for p in tl.static_range(UP):
        added += (_upsampled(zero, biases, up_taps, p, 0, 1, UP, UP_TAPS, BEFORE_X, LOW_X),)  # type: ignore[assignment]
    o = tl.program_id(1) * deep
    ours = tl.where(keep, tl.minimum(deep, out_y - o), 0).to(tl.uint32)
    row = o * DOWN // UP + LOW_Y  # a program starts at a multiple of UP
    at = x + b.to(tl.int64) * x_b + c.to(tl.int64) * x_c + (q.to(tl.int64) + LOW_X) * x_x
    at += tl.cast(row, tl.int64) * x_y
    kept, sums = (), ()
    for _ in tl.static_range(KEPT):
        kept += _across(at, near, row, height, width, x_x, up_taps, added, UP, UP_TAPS, BEFORE_X, LOW_X, SPAN_X)  # type: ignore[assignment]
        row += 1
        at += x_y
    for _ in tl.static_range(PENDING * UP):
        sums += (zero,)  # type: ignore[assignment]
    to += tl.cast(o, tl.int64) * (UP * pitch)
    done = 0
    for _ in range(rounds):
        rows = kept
        for _ in tl.static_range(NEW):
            rows += _across(at, near, row, height, width, x_x, up_taps, added, UP, UP_TAPS, BEFORE_X, LOW_X, SPAN_X)
            row += 1
            at += x_y
        before, sums = sums, ()
        for column in tl.static_range(UP):
            high = ()
            for v in tl.static_range(ROWS):
                one = _upsampled(zero, rows, up_taps, v, column, UP, UP, UP_TAPS, BEFORE_Y, LOW_Y)
                one *= tl.where(one < 0.0, slope, gain)
                if CLAMP:
                    one = tl.clamp(one, -clamp, clamp, propagate_nan=tl.PropagateNan.ALL)
                high += (one,)
            for g in tl.static_range(-PENDING, ROWS // DOWN):
                low = before[column * PENDING + g + PENDING] if g < 0 else zero
                for v in tl.static_range(max(0, DOWN * g), min(ROWS, DOWN * g + DOWN_TAPS)):
                    low += high[v] * down_taps[v - DOWN * g]
                if DOWN * g + DOWN_TAPS <= ROWS:
                    place = to + tl.cast(pitch, tl.int64) * (g * UP + column)
                    tl.store(place, low, mask=tl.cast(done + g, tl.uint32) < ours)  # a negative number is large
                else:
                    sums += (low,)
        kept = ()
        for i in tl.static_range(KEPT * UP):
            kept += (rows[NEW * UP + i],)
        done += ROWS // DOWN
        to += tl.cast(pitch, tl.int64) * (ROWS // DOWN * UP)


@triton.jit
def down_kernel(
    between, down_filter, y, channels, columns, out_y, out_x, across, tiles, down_step, y_b, y_c, y_y, y_x,
    UP: tl.constexpr, DOWN: tl.constexpr, DOWN_TAPS: tl.constexpr, UNIT: tl.constexpr, FLIP: tl.constexpr,
    DOWN_FILTER: tl.constexpr, LAST: tl.constexpr, EACH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """UNIT outputs beside each other, which take a whole number of q, of EACH rows a lane; ``across`` of them make a
    row.  A program has LANES of them of one plane, or where LAST of one row's channels."""
    outer, lane = tl.program_id(0) // tiles, tl.program_id(0) % tiles * LANES + tl.arange(0, LANES)
    if LAST:
        b, c, s, step = outer // out_y, lane % channels, lane // channels, channels
        o_y = outer % out_y + tl.zeros((LANES,), tl.int32)
        keep = s < across
        between += tl.cast(outer, tl.int64) * (UP * columns * channels) + c
    else:
        b, c, s, step = outer // channels, outer % channels, lane % across, 1
        o_y = lane // across * EACH
        keep = o_y < out_y
        between += tl.cast(outer, tl.int64) * out_y * (UP * columns) + o_y.to(tl.int64) * (UP * columns)
    taps = _taps(down_filter, down_step, 1.0, DOWN_TAPS, FLIP, DOWN_FILTER)
    at = between + s.to(tl.int64) * (UNIT * DOWN // UP * step)
    to = y + b.to(tl.int64) * y_b + c.to(tl.int64) * y_c + o_y.to(tl.int64) * y_y + s.to(tl.int64) * (UNIT * y_x)
    for r in tl.static_range(EACH):
        elements = ()
        there = keep & (o_y + r < out_y)
        for m in tl.static_range(DOWN * (UNIT - 1) + DOWN_TAPS):
            line = at + tl.cast(columns * step, tl.int64) * (r * UP + m % UP)
            elements += (tl.load(line + tl.cast(step, tl.int64) * (m // UP), mask=there),)
        for e in tl.static_range(UNIT):
            acc = tl.zeros((LANES,), tl.float32)
            for k in tl.static_range(DOWN_TAPS):
                acc += elements[DOWN * e + k] * taps[k]
            place = tl.cast(y_y, tl.int64) * r + tl.cast(y_x, tl.int64) * e
            tl.store(to + place, acc.to(y.dtype.element_ty), mask=there & (s * UNIT + e < out_x))


def met(axis: Axis, rows: int) -> tuple[int, int]:
    """The first element that upsampled element 0 or one of the ``rows`` from it on meets, and how many from there."""
    starts = []
    for v in range(rows):
        first = (axis.before - v) % axis.up
        start = (v - axis.before + first) // axis.up
        starts.append((start, start + blocks(axis.taps - first, axis.up)))
    low = min(start for start, _ in starts)
    return low, max(max(end for _, end in starts) - low, rows // axis.up)


def rows_of_a_round(up: int, down: int) -> int:
    """A multiple of both factors, so that every round is like the first."""
    both = math.lcm(up, down)
    return both * blocks(ROWS, both)


def suits(x: Tensor, up_filter: Tensor | None, down_filter: Tensor | None, along: tuple[Any, Any]) -> bool:
    """Whether the filters are separable, a thread's registers hold what a round of the loop leaves to the next, and
    threads can be counted."""
    if any(f is not None and f.dim() == 2 for f in (up_filter, down_filter)):
        return False
    (rise, fall), (rise_y, _) = along
    if x.shape[0] * x.shape[1] * (blocks(rise.out, rise.up) + 1) >= 2**31 - LANES:
        return False
    rows = rows_of_a_round(rise.up, fall.down)
    kept = met(rise_y, rows)[1] - rows // rise.up
    held = rise.taps + fall.taps + rise.up * (kept + (fall.taps - 1) // fall.down)
    return rows <= LONGEST and held <= HELD and met(rise, rise.up)[1] < 32


def _deep(up: int, down: int, taps: int, out: int, across: int, full: int) -> tuple[int, int]:
    """Rounds of a program, and the rows of outputs that it completes; neither changes a bit of any of them.

    Where ``across`` programs stand beside each other, and a processor has ``full`` at once.  What is least is the
    rounds that a processor takes if all it has is as long as its longest.  Below three rounds most of the rows that a
    program reads are read by others too.
    """
    rows, unit, found = rows_of_a_round(up, down), up // math.gcd(up, down), []
    most = blocks((blocks(out, unit) * unit - 1) * down + taps, rows)
    for rounds in range(min(most, max(3, blocks(taps + (unit - 1) * down, rows))), most + 1):
        deep = ((rounds * rows - taps) // down + 1) // unit * unit
        waves = blocks(across * blocks(out, deep), PROCESSORS * full)
        found.append(((rounds + 0.75) * waves, rounds, deep))
    return min(found)[1:]


def _down(y: Tensor, shared: dict[str, Any], out_x: int, out_y: int) -> Stage:
    """The second launch; four outputs a thread: of channels beside each other, or of rows."""
    last, unit = shared["LAST"], shared["UP"] // math.gcd(shared["UP"], shared["DOWN"])
    across, (each, group) = blocks(out_x, unit), (1, 512) if last else (4, 128)
    tiles = blocks(across * (y.shape[1] if last else blocks(out_y, each)), group)
    values: dict[str, Any] = {f"y_{n}": s for n, s in zip("bcyx", y.stride(), strict=True)}
    values |= {"y": y, "out_x": out_x, "across": across, "tiles": tiles, "UNIT": unit, "EACH": each, "LANES": group}
    outer = y.shape[0] * (out_y if last else y.shape[1])
    return Stage(down_kernel, (outer * tiles,), shared | values, {"num_warps": 4})


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], along: Any, given: tuple[Any, ...]) -> tuple[Stage, ...]:
    """The two launches; ``along``: the axes x and y, ``given``: what stands for x, the filters and the bias."""
    x, up_filter, down_filter, bias, up, down, _, gain, slope, clamp, flip = args
    (y,) = outs
    (rise_x, fall_x), (rise_y, fall_y) = along
    channels, last, unit = x.shape[1], is_channels_last(y), up // math.gcd(up, down)
    across = blocks(fall_x.out, unit)  # and the columns that these meet
    columns = unit * down // up * (across - 1) + (down * (unit - 1) + fall_x.taps - 1) // up + 1
    lanes, rows = x.shape[0] * channels * columns, rows_of_a_round(up, down)
    between = torch.empty((x.shape[0] * channels, fall_y.out, up, columns), dtype=torch.float32, device=x.device)
    (low_y, span_y), (low_x, span_x) = met(rise_y, rows), met(rise_x, up)
    registers = 128 if up <= 2 else 168  # what is least without spills
    full = REGISTERS // (registers * LANES)
    rounds, deep = _deep(up, down, fall_y.taps, fall_y.out, blocks(lanes, LANES), full)
    steps = [0 if f is None else f.stride(0) for f in (up_filter, down_filter)]
    shared = {
        "down_filter": given[2], "between": between, "channels": channels, "columns": columns, "out_y": fall_y.out,
        "down_step": steps[1], "UP": up, "DOWN": down, "DOWN_TAPS": fall_x.taps, "FLIP": flip,
        "DOWN_FILTER": down_filter is not None, "LAST": last,
    }  # fmt: skip
    first = {f"x_{n}": s for n, s in zip("bcyx", x.stride(), strict=True)}
    first |= {
        "x": given[0], "up_filter": given[1], "bias": given[3], "height": x.shape[2], "width": x.shape[3],
        "lanes": lanes, "rounds": rounds, "deep": deep, "up_step": steps[0], "gain": gain, "slope": gain * slope,
        "clamp": 0.0 if clamp is None else clamp, "UP_TAPS": rise_x.taps, "BEFORE_Y": rise_y.before,
        "BEFORE_X": rise_x.before, "LOW_Y": low_y, "LOW_X": low_x, "SPAN_Y": span_y, "SPAN_X": span_x, "ROWS": rows,
        "UP_FILTER": up_filter is not None, "BIAS": bias is not None, "CLAMP": clamp is not None, "LANES": LANES,
    }  # fmt: skip
    grid = blocks(lanes, LANES), blocks(fall_y.out, deep)
    rise = Stage(columns_kernel, grid, shared | first, {"num_warps": 4, "maxnreg": registers})
    return rise, _down(y, shared, fall_x.out, fall_y.out)
