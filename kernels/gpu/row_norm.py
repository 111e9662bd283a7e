"""One Triton kernel for the norms over the last dimension: whole rows in registers, several to a program where short.

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

from fusegen.kernels.gpu.launch import Stage, Use, blocks, power
from fusegen.kernels.rows import Rows, rows_of, spread

WIDEST = 32768  # the longest row held in the registers of 32 warps
SOURCE = Path(__file__)
_SPREAD = ("x", "branch", "gate", "scale", "shift")  # what has x's shape, broadcast or not; the rest is (C,)
_OPTIONAL = ("branch", "gate", "weight", "bias", "scale", "shift")


@triton.jit
def row_norm_kernel(
    x, branch, gate, weight, bias, scale, shift, y, total, rows, inner, width, eps, offset,
    x_outer, x_inner, x_d, branch_outer, branch_inner, branch_d, gate_outer, gate_inner, gate_d,
    scale_outer, scale_inner, scale_d, shift_outer, shift_inner, shift_d,
    RMS: tl.constexpr, BRANCH: tl.constexpr, GATE: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program; row r of x starts at (r // inner) * x_outer + (r % inner) * x_inner; y is contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    keep = (row < rows) & (d < width)
    far, near = row // inner, row % inner
    tile = tl.load(x + far * x_outer + near * x_inner + d * x_d, mask=keep, other=0.0).to(tl.float32)
    if BRANCH:
        added = tl.load(branch + far * branch_outer + near * branch_inner + d * branch_d, mask=keep, other=0.0)
        added = added.to(tl.float32)
        if GATE:
            own = tl.load(gate + far * gate_outer + near * gate_inner + d * gate_d, mask=keep, other=0.0)
            added = added * own.to(tl.float32)
        stored = (tile + added).to(total.dtype.element_ty)
        tl.store(total + row * width + d, stored, mask=keep)
        tile = stored.to(tl.float32)  # the norm is that of the sum as stored
    count = tl.cast(width, tl.float32)
    if not RMS:
        mean = (tl.sum(tile, axis=1) / count)[:, None]
        tile = tl.where(keep, tile - mean, 0.0)
    out = tile / tl.sqrt((tl.sum(tile * tile, axis=1) / count)[:, None] + eps)
    if WEIGHT:
        out = out * (tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32) + offset)
    if BIAS:
        out = out + tl.load(bias + d, mask=d < width, other=0.0).to(tl.float32)
    if SCALE:
        own = tl.load(scale + far * scale_outer + near * scale_inner + d * scale_d, mask=keep, other=0.0)
        out = out * (1.0 + own.to(tl.float32))
    if SHIFT:
        own = tl.load(shift + far * shift_outer + near * shift_inner + d * shift_d, mask=keep, other=0.0)
        out = out + own.to(tl.float32)
    tl.store(y + row * width + d, out.to(y.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class Config:
    """``rows`` a program, and its warps."""

    rows: int
    num_warps: int


def key(x: Tensor, *rest: Any) -> str:
    """The row's length, its dtype, and which tensors of more than one dimension come with it."""
    more = sum(isinstance(a, Tensor) and a.dim() > 1 for a in rest)
    return f"{x.shape[-1]} {str(x.dtype).removeprefix('torch.')} {more}"


def default(x: Tensor, *rest: Any, limit: int = 0) -> Config:
    """About 1024 elements a program, one warp for every 1024 bytes of them: with twice that, float32 may spill."""
    block = power(x.shape[-1])
    rows = max(1, min(16, 1024 // block))
    return Config(rows, max(1, min(32, rows * block * x.element_size() // 1024)))


def space(x: Tensor, *rest: Any) -> Iterator[Config]:
    """1 to 16 rows, with 4 to 64 elements a thread."""
    for rows in (1, 2, 4, 8, 16):
        for warps in (1, 2, 4, 8, 16, 32):
            if 4 <= rows * power(x.shape[-1]) // (32 * warps) <= 64:
                yield Config(rows, warps)


def small(*args: Any) -> Iterator[Config]:
    """For tests: several rows a program, so that some programs are cut."""
    yield Config(4, 4)


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
    for name in _SPREAD:
        outer, inner = strides.get(name, (0, 0))
        last = views[name].stride(-1) if name in views else 0
        values |= {f"{name}_outer": outer, f"{name}_inner": inner, f"{name}_d": last}
    count = rows.outer * rows.inner
    values |= {"y": outs[0], "total": outs[-1], "rows": count, "inner": rows.inner, "width": x.shape[-1]}
    values |= {"eps": eps, "offset": offset, "RMS": rms} | {n.upper(): there[n] for n in _OPTIONAL}
    values |= {"ROWS": config.rows, "BLOCK": power(x.shape[-1])}
    return (Stage(row_norm_kernel, (blocks(count, config.rows),), values, {"num_warps": config.num_warps}),)


def decline(args: tuple[Any, ...], roles: Mapping[str, int]) -> str | None:
    """Rows too long for registers, and leading dimensions that need more than two strides."""
    x = args[roles["x"]]
    if x.shape[-1] > WIDEST:
        return f"a row of {x.shape[-1]} does not fit a block's registers (limit {WIDEST})"
    if x.numel() and _rows(roles, args)[0] is None:
        return f"the rows of strides {tuple(x.stride()[:-1])} need more than two strides"
    return None
