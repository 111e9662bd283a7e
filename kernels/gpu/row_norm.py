"""One Triton kernel for the norms over the last dimension: whole rows in registers, several to a program where short.

A row is held as chunks of a power of two, few of whose lanes are idle: 640 is five of 128, half a warp's.

Layer norm or RMS norm of x, or of x + gate * branch with that sum written as well; then weight and bias, scale and
shift.  :mod:`.layer_norm`, :mod:`.rms_norm` and :mod:`.add_norm` name the arguments of their schemas by role.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu.counting import MANY, cover, divider, quotient
from fusegen.kernels.gpu.launch import ALIGNMENT, Stage, Use, blocks, power, unit
from fusegen.kernels.rows import Rows, rows_of, spread

WIDEST = 32768  # the longest row held in the registers of 32 warps
SOURCE = Path(__file__)
_SPREAD = ("x", "branch", "gate", "scale", "shift")  # what has x's shape, broadcast or not; the rest is (C,)
_OPTIONAL = ("branch", "gate", "weight", "bias", "scale", "shift")


@triton.jit
def _tile(p, k, row, rows, p_d, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk ``k`` of the rows at ``p`` (ROWS, 1)."""
    d = k * CHUNK + tl.arange(0, CHUNK)[None, :]
    keep = (row < rows) & (d < WIDTH) if (k + 1) * CHUNK > WIDTH else row < rows
    return tl.load(p + d.to(tl.int64) * p_d, mask=keep, other=0.0)


@triton.jit
def _tiles(p, row, rows, p_d, EARLY: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """All chunks of the rows at ``p``; not EARLY, ``p`` for :func:`_one` to read them from."""
    if EARLY:
        tiles = ()
        for k in tl.static_range(CHUNKS):
            tiles += (_tile(p, k, row, rows, p_d, WIDTH, CHUNK),)  # type: ignore[assignment]
    else:
        tiles = p
    return tiles


@triton.jit
def _one(tiles, k: tl.constexpr, row, rows, p_d, EARLY: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    return (tiles[k] if EARLY else _tile(tiles, k, row, rows, p_d, WIDTH, CHUNK)).to(tl.float32)


@triton.jit
def row_norm_kernel(
    x, branch, gate, weight, bias, scale, shift, y, total, rows, inner, by, turn, eps, offset,
    x_outer, x_inner, x_d, branch_outer, branch_inner, branch_d, gate_outer, gate_inner, gate_d,
    scale_outer, scale_inner, scale_d, shift_outer, shift_inner, shift_d,
    RMS: tl.constexpr, BRANCH: tl.constexpr, GATE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, FLAT: tl.constexpr, EARLY: tl.constexpr, UNIT: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of WIDTH a program; row r of x starts at ((r // inner) * x_outer + (r % inner) * x_inner) * UNIT; y is
    contiguous.

    EARLY, all is read before the first sum, whose wait would otherwise come before the parameters'; rows that leave no
    registers for it read those late.  FLAT: inner is all rows.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    outer = row * 0 if FLAT else quotient(row, by, turn)
    far, near = outer.to(tl.int64) * UNIT, (row - outer * inner).to(tl.int64) * UNIT
    at = far * x_outer + near * x_inner
    tiles = _tiles(x + at, row, rows, x_d, True, WIDTH, CHUNK, CHUNKS)
    if BRANCH:
        at = far * branch_outer + near * branch_inner
        added = _tiles(branch + at, row, rows, branch_d, EARLY, WIDTH, CHUNK, CHUNKS)
    if GATE:
        at = far * gate_outer + near * gate_inner
        gates = _tiles(gate + at, row, rows, gate_d, EARLY, WIDTH, CHUNK, CHUNKS)
    always = far * 0  # a parameter as if each row had its own: no exchange between threads
    if WEIGHT:
        weights = _tiles(weight + always, row, rows, 1, EARLY, WIDTH, CHUNK, CHUNKS)
    if BIAS:
        biases = _tiles(bias + always, row, rows, 1, EARLY, WIDTH, CHUNK, CHUNKS)
    if SCALE:
        at = far * scale_outer + near * scale_inner
        scales = _tiles(scale + at, row, rows, scale_d, EARLY, WIDTH, CHUNK, CHUNKS)
    if SHIFT:
        at = far * shift_outer + near * shift_inner
        shifts = _tiles(shift + at, row, rows, shift_d, EARLY, WIDTH, CHUNK, CHUNKS)

    start = row.to(tl.int64) * WIDTH
    e = tl.arange(0, CHUNK)[None, :]
    sums, held = tl.zeros((ROWS, CHUNK), tl.float32), ()
    for k in tl.static_range(CHUNKS):
        tile = tiles[k].to(tl.float32)
        if BRANCH:
            more = _one(added, k, row, rows, branch_d, EARLY, WIDTH, CHUNK)
            if GATE:
                more = more * _one(gates, k, row, rows, gate_d, EARLY, WIDTH, CHUNK)
            stored = (tile + more).to(total.dtype.element_ty)
            keep = (row < rows) & (k * CHUNK + e < WIDTH) if (k + 1) * CHUNK > WIDTH else row < rows
            tl.store(total + (start + k * CHUNK + e), stored, mask=keep)
            tile = stored.to(tl.float32)  # the norm is that of the sum as stored
        held += (tile,)  # type: ignore[assignment]
        sums += tile
    mean = tl.zeros((ROWS, 1), tl.float32) if RMS else tl.sum(sums, axis=1)[:, None] * (1.0 / WIDTH)
    squares = tl.zeros((ROWS, CHUNK), tl.float32)
    for k in tl.static_range(CHUNKS):
        away = held[k] if RMS else held[k] - mean
        if (k + 1) * CHUNK > WIDTH and not RMS:
            away = tl.where(k * CHUNK + e < WIDTH, away, 0.0)
        squares += away * away
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=1)[:, None] * (1.0 / WIDTH) + eps)
    for k in tl.static_range(CHUNKS):
        out = (held[k] if RMS else held[k] - mean) * rstd
        if WEIGHT:
            out = out * (_one(weights, k, row, rows, 1, EARLY, WIDTH, CHUNK) + offset)
        if BIAS:
            out = out + _one(biases, k, row, rows, 1, EARLY, WIDTH, CHUNK)
        if SCALE:
            out = out * (1.0 + _one(scales, k, row, rows, scale_d, EARLY, WIDTH, CHUNK))
        if SHIFT:
            out = out + _one(shifts, k, row, rows, shift_d, EARLY, WIDTH, CHUNK)
        keep = (row < rows) & (k * CHUNK + e < WIDTH) if (k + 1) * CHUNK > WIDTH else row < rows
        tl.store(y + (start + k * CHUNK + e), out.to(y.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class Config:
    """``rows`` a program, read ``chunk`` elements at a time, and its warps."""

    rows: int
    chunk: int
    num_warps: int


def key(x: Tensor, *rest: Any) -> str:
    """The row's length, its dtype, and which tensors of more than one dimension come with it."""
    more = sum(isinstance(a, Tensor) and a.dim() > 1 for a in rest)
    return f"{x.shape[-1]} {str(x.dtype).removeprefix('torch.')} {more}"


def _config(x: Tensor, most: int, warps: int) -> Config:
    """Chunks of at most ``most`` elements; as many rows as make a thread hold 16 bytes of each chunk."""
    lanes = max(1, (chunk := cover(x.shape[-1], most)) * x.element_size() // ALIGNMENT)
    return Config(max(1, 32 * warps // lanes), chunk, max(warps, min(32, lanes // 32)))


def default(x: Tensor, *rest: Any, limit: int = 0) -> Config:
    """A quarter of a row at once, but what a warp reads: 8 to 56 elements a thread, and short rows within a warp."""
    return _config(x, max(32 * ALIGNMENT // x.element_size(), power(x.shape[-1]) // 4), 4)


def space(x: Tensor, *rest: Any) -> Iterator[Config]:
    """Chunks of 64 to 4096, up to 64 elements a thread."""
    for most in (64, 128, 256, 512, 1024, 2048, 4096, 8192):
        for warps in (1, 2, 4, 8):
            found = _config(x, most, warps)
            if blocks(x.shape[-1], found.chunk) * found.chunk * found.rows <= 64 * 32 * found.num_warps:
                yield found


def small(*args: Any) -> Iterator[Config]:
    """For tests: several rows a program and chunks a row, so that some are cut."""
    yield Config(4, 16, 4)


def _rows(roles: Mapping[str, int], args: tuple[Any, ...]) -> tuple[Rows | None, dict[str, Tensor]]:
    """The rows of all tensors that have x's shape, and those tensors as views of that shape."""
    x = args[roles["x"]]
    views = {n: spread(args[roles[n]], x) for n in _SPREAD if n in roles and args[roles[n]] is not None}
    return rows_of(list(views.values())), views


def stages(
    outs: tuple[Tensor, ...],
    args: tuple[Any, ...],
    config: Config,
    roles: Mapping[str, int],
    rms: bool,
    eps: float,
    offset: float = 0.0,
) -> tuple[Stage, ...]:
    """One launch; ``roles``: a parameter of the kernel -> the position of the argument it takes."""
    x = args[roles["x"]]
    if not x.numel():
        return ()
    rows, views = _rows(roles, args)
    assert rows is not None
    there = {n: n in roles and args[roles[n]] is not None for n in _OPTIONAL}
    values: dict[str, Any] = {n: Use(roles[n] if there.get(n, True) else roles["x"]) for n in ("x", *_OPTIONAL)}
    strides = dict(zip(views, rows.strides, strict=True))
    size = unit(x.element_size(), *(step for pair in rows.strides for step in pair))
    for name in _SPREAD:
        outer, inner = (step // size for step in strides.get(name, (0, 0)))
        last = views[name].stride(-1) if name in views else 0
        values |= {f"{name}_outer": outer, f"{name}_inner": inner, f"{name}_d": last}
    count, (by, turn), width = rows.outer * rows.inner, divider(rows.inner), x.shape[-1]
    values |= {"y": outs[0], "total": outs[-1], "rows": count, "inner": rows.inner, "by": by, "turn": turn}
    values |= {"eps": eps, "offset": offset, "RMS": rms} | {n.upper(): there[n] for n in _OPTIONAL}
    values |= {"FLAT": rows.outer == 1, "UNIT": size, "WIDTH": width, "ROWS": config.rows}
    held = blocks(width, config.chunk) * config.chunk * config.rows // (32 * config.num_warps)
    values |= {"CHUNK": config.chunk, "CHUNKS": blocks(width, config.chunk)}
    values["EARLY"] = held <= 40 and config.num_warps <= 8
    return (Stage(row_norm_kernel, (blocks(count, config.rows),), values, {"num_warps": config.num_warps}),)


def decline(args: tuple[Any, ...], roles: Mapping[str, int]) -> str | None:
    """Rows too long for registers, 2^31 rows, and leading dimensions that need more than two strides."""
    x = args[roles["x"]]
    if x.shape[-1] > WIDEST:
        return f"a row of {x.shape[-1]} does not fit a block's registers (limit {WIDEST})"
    if x.numel() >= MANY * max(x.shape[-1], 1):
        return f"{x.numel() // x.shape[-1]} rows are 2^31 or more"
    if x.numel() and _rows(roles, args)[0] is None:
        return f"the rows of strides {tuple(x.stride()[:-1])} need more than two strides"
    return None
