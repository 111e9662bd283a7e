"""What rope and qk_norm_rope share on NVIDIA GPUs: one kernel, whole rows of x in registers, several to a program."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu.counting import MANY, indices, three, wide
from fusegen.kernels.gpu.launch import Stage, blocks, power, unit
from fusegen.kernels.strides import merged


@triton.jit
def load_pairs(p, step, keep, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """The two features of each pair, each (ROWS, BLOCK) float32, of the rows at ``p`` (ROWS, 1)."""
    if PAIRS:  # neighbours: one wide read, taken apart in registers
        e = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.load(p + e * step, mask=keep & (e < 2 * HALF), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, (ROWS, BLOCK, 2)))
    else:
        e = tl.arange(0, BLOCK)[None, :]
        a = tl.load(p + e * step, mask=keep & (e < HALF), other=0.0).to(tl.float32)
        b = tl.load(p + (HALF + e) * step, mask=keep & (e < HALF), other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_pairs(p, a, b, keep, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    kind = p.dtype.element_ty
    if PAIRS:
        e = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.reshape(tl.join(a.to(kind), b.to(kind)), (ROWS, 2 * BLOCK))
        tl.store(p + e, both, mask=keep & (e < 2 * HALF))
    else:
        e = tl.arange(0, BLOCK)[None, :]
        tl.store(p + e, a.to(kind), mask=keep & (e < HALF))
        tl.store(p + HALF + e, b.to(kind), mask=keep & (e < HALF))


@triton.jit
def load_table(p, step, keep, HALF: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
               FULL: tl.constexpr):  # fmt: skip
    """A table's entries for the first and the second feature of each pair."""
    if FULL:
        a, b = load_pairs(p, step, keep, HALF, BLOCK, ROWS, PAIRS)
    else:
        e = tl.arange(0, BLOCK)[None, :]
        a = tl.load(p + e * step, mask=keep & (e < HALF), other=0.0).to(tl.float32)
        b = a
    return a, b


@triton.jit
def rotate_kernel(
    x, weight, cos, sin, positions, y, rows, n1, n2, by1, shift1, by2, shift2, x0, x1, x2, x_d, y0, y1, y2,
    t0, t1, t2, t_d, p0, p1, p2, entries, eps,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, POSITIONS: tl.constexpr, FULL: tl.constexpr, PAIRS: tl.constexpr,
    WIDTH: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, FLAT: tl.constexpr,
    WIDE: tl.constexpr, UNIT: tl.constexpr, TABLE_UNIT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of WIDTH features a program; HALF pairs turn, and the REST (padded to a power of two) pass.

    Rows are counted in three loops (.., n1, n2), with strides of x and y in multiples of UNIT, t of the tables in
    those of TABLE_UNIT, p of the positions; with POSITIONS the tables have ``entries`` rows of stride t0, and a row
    outside them is NaN.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    keep = row < rows
    i0, i1, i2 = indices(row, n1, n2, by1, shift1, by2, shift2, FLAT, WIDE)
    start = x + (i0 * x0 + i1 * x1 + i2 * x2) * UNIT
    a, b = load_pairs(start, x_d, keep, HALF, BLOCK, ROWS, PAIRS)
    if REST:
        r = tl.arange(0, REST)[None, :]
        rest_here = keep & (r < WIDTH - 2 * HALF)
        rest = tl.load(start + (2 * HALF + r) * x_d, mask=rest_here, other=0.0).to(tl.float32)
    if NORM:
        square = tl.sum(a * a + b * b, axis=1)
        if REST:
            square += tl.sum(rest * rest, axis=1)
        scale = (1.0 / tl.sqrt(square / WIDTH + eps))[:, None]
        a, b = a * scale, b * scale
        if REST:
            rest = rest * scale
        if WEIGHT:
            always = tl.full((1, 1), True, tl.int1)
            w, v = load_pairs(weight, 1, always, HALF, BLOCK, 1, PAIRS)
            a, b = a * w, b * v
            if REST:
                rest = rest * tl.load(weight + 2 * HALF + r, mask=r < WIDTH - 2 * HALF, other=0.0).to(tl.float32)
    inside = keep
    if POSITIONS:
        at = tl.load(positions + i0 * p0 + i1 * p1 + i2 * p2, mask=keep, other=-1).to(tl.int64)
        inside = (at >= 0) & (at < entries)
        offset = tl.where(inside, at, 0) * t0 * TABLE_UNIT
    else:
        offset = (i0 * t0 + i1 * t1 + i2 * t2) * TABLE_UNIT
    ca, cb = load_table(cos + offset, t_d, inside, HALF, BLOCK, ROWS, PAIRS, FULL)
    sa, sb = load_table(sin + offset, t_d, inside, HALF, BLOCK, ROWS, PAIRS, FULL)
    if POSITIONS:
        ca, cb = tl.where(inside, ca, float("nan")), tl.where(inside, cb, float("nan"))
    target = y + (i0 * y0 + i1 * y1 + i2 * y2) * UNIT
    store_pairs(target, a * ca - b * sa, b * cb + a * sb, keep, HALF, BLOCK, ROWS, PAIRS)
    if REST:
        tl.store(target + 2 * HALF + r, rest.to(y.dtype.element_ty), mask=rest_here)


@dataclass(frozen=True)
class Config:
    """``rows`` a program, and its warps."""

    rows: int
    num_warps: int


def default(x: Tensor, *rest: Any, limit: int = 0) -> Config:
    """About 2048 elements a program, 16 a thread."""
    rows = max(1, min(64, 2048 // power(x.shape[-1])))
    return Config(rows, max(1, min(16, rows * power(x.shape[-1]) // 512)))


def space(x: Tensor, *rest: Any) -> Iterator[Config]:
    """1 to 64 rows, with 4 to 32 elements a thread."""
    for rows in (1, 2, 4, 8, 16, 32, 64):
        for warps in (1, 2, 4, 8, 16):
            if 4 <= rows * power(x.shape[-1]) // (32 * warps) <= 32:
                yield Config(rows, warps)


def small(*args: Any) -> Iterator[Config]:
    yield Config(2, 1)


def kind(x: Tensor, interleaved: bool, rotary_dim: int | None) -> str:
    """The head dimension, how much of it turns, its dtype and layout."""
    turned = x.shape[-1] if rotary_dim is None else rotary_dim
    return f"{x.shape[-1]}/{turned} {str(x.dtype).removeprefix('torch.')}{' pairs' if interleaved else ''}"


def loops(x: Tensor, y: Tensor, cos: Tensor, positions: Tensor | None) -> Any:
    """The sizes of the three loops over rows, and the strides of y, x, the tables and the positions for each."""
    shape = x.shape[:-1]
    none = (0,) * len(shape)
    tables = cos.expand(*shape, cos.shape[-1]).stride()[:-1] if positions is None else none
    places = none if positions is None else positions.expand(shape).stride()
    return merged(shape, [y.stride()[:-1], x.stride()[:-1], tables, places])


def decline(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> str | None:
    """Tables that differ in layout, and 2^31 rows.  (Any rows of up to four dimensions are three loops.)"""
    if cos.stride() != sin.stride():
        return f"cos has strides {cos.stride()} and sin {sin.stride()}"
    if x.numel() >= MANY * max(x.shape[-1], 1):
        return f"{x.numel() // x.shape[-1]} rows are 2^31 or more"
    return None


def stages(
    y: Tensor, x: Tensor, cos: Tensor, positions: Tensor | None, interleaved: bool, rotary_dim: int | None,
    config: Config, named: dict[str, Any], weight: bool | None = None, eps: float = 0.0,
) -> tuple[Stage, ...]:  # fmt: skip
    """One launch.  ``named``: the tensors' places; ``weight``: whether there is one, None where there is no norm."""
    if not x.numel():
        return ()
    sizes, (ys, xs, ts, ps) = loops(x, y, cos, positions)
    width, rows = x.shape[-1] if rotary_dim is None else rotary_dim, math.prod(sizes)
    ts = ts if positions is None else (cos.stride(0), 0, 0)
    size, size_t = unit(x.element_size(), *xs, *ys), unit(cos.element_size(), *ts)
    spans = ((*xs, x.stride(-1)), (*ys, 1), (*(ts if positions is None else ps), cos.stride(-1)))
    values = {
        **named,
        "y": y,
        "rows": rows,
        **three(*sizes),
        **_each("x", [s // size for s in xs]),
        "x_d": x.stride(-1),
        **_each("y", [s // size for s in ys]),
        **_each("t", [s // size_t for s in ts]),
        "t_d": cos.stride(-1),
        **_each("p", ps),
        "entries": cos.shape[0] if positions is not None else 0,
        "eps": eps,
        "NORM": weight is not None,
        "WEIGHT": bool(weight),
        "POSITIONS": positions is not None,
        "FULL": cos.shape[-1] == width,
        "PAIRS": interleaved,
        "WIDTH": x.shape[-1],
        "HALF": width // 2,
        "BLOCK": power(width // 2),
        "REST": power(x.shape[-1] - width) if x.shape[-1] > width else 0,
        "WIDE": wide((*sizes, x.shape[-1]), *spans),
        "UNIT": size,
        "TABLE_UNIT": size_t,
        "ROWS": config.rows,
    }
    return (Stage(rotate_kernel, (blocks(rows, config.rows),), values, {"num_warps": config.num_warps}),)


def _each(name: str, steps: Sequence[int]) -> dict[str, int]:
    return {f"{name}{i}": step for i, step in enumerate(steps)}
