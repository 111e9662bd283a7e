"""Bias, activation, gain and clamp on NVIDIA GPUs: a tile of rows a program, so that a channel is a row or a column."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.bias_act import Folded, finish, folded
from fusegen.kernels.gpu.activation import activated
from fusegen.kernels.gpu.counting import MANY, cover, divider, quotient, wide
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, meta, unit
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.op import Kernel

X, BIAS = 0, 1  # positions of the tensors in the schema


@triton.jit
def bias_act_kernel(
    x, bias, y, rows, width, across, by, shift, channels, by_c, shift_c, x_outer, x_channel, x_d, y_row,
    alpha, gain, clamp,
    BIAS: tl.constexpr, ACT: tl.constexpr, CLAMP: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS x BLOCK elements of y, ``across`` programs a row; channels are the columns, or row ``r`` has r % channels.

    Strides of rows are in multiples of UNIT.
    """
    program = tl.program_id(0)
    tile = quotient(program, by, shift)
    first = (program - tile * across).to(tl.int64) * BLOCK
    row, d = tile * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    here = d < tl.minimum(width - first, BLOCK).to(tl.int32)
    keep = (row < rows) & here
    outer = row if COLUMNS else quotient(row, by_c, shift_c)
    channel = row - outer * channels  # where channels are rows
    if BIAS:
        if COLUMNS:
            b = tl.load(bias + first + d, mask=here, other=0.0)
        else:
            b = tl.load(bias + channel, mask=row < rows, other=0.0)
    if WIDE:
        row, outer, channel, d = row.to(tl.int64), outer.to(tl.int64), channel.to(tl.int64), d.to(tl.int64)
    at = outer * x_outer if COLUMNS else outer * x_outer + channel * x_channel
    value = tl.load(x + first * x_d + (at * UNIT + d * x_d), mask=keep, other=0.0).to(tl.float32)
    if BIAS:
        value += b.to(tl.float32)
    value = activated(value, alpha, ACT) * gain
    if CLAMP:
        value = tl.minimum(value, clamp, propagate_nan=tl.PropagateNan.ALL)
        value = tl.maximum(value, -clamp, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + first + (row * y_row * UNIT + d), value.to(y.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class Config:
    """A tile of ``rows`` x ``columns``, and its warps."""

    rows: int
    columns: int
    num_warps: int


def _tiled(x: Tensor, bias: Tensor | None, dim: int) -> tuple[Folded, bool, tuple[int, int]]:
    """x in the memory order of its output, whether its channels are the columns of a tile, and all rows and columns."""
    view = folded(x, bias, dim)
    assert view is not None
    outer, channels, inner = view.sizes
    if inner == 1 and bias is not None:
        return view, True, (outer, channels)
    dense = view.strides[1] == inner * view.strides[2] and view.strides[0] == channels * view.strides[1]
    if bias is None and (outer == 1 or dense):
        return view, False, (1, outer * inner)
    return view, False, (outer * channels, inner)


def key(x: Tensor, bias: Tensor | None, dim: int, act: str, *rest: Any) -> str:
    """The row's length, where it is not the whole, what its rows are, the dtype and the activation."""
    _, columns, (_, width) = _tiled(x, bias, dim) if x.numel() else (None, False, (0, 0))
    kind = f"{width} {'columns' if columns else 'rows'}" if bias is not None else "no bias"
    return f"{kind} {str(x.dtype).removeprefix('torch.')} {act}"


def default(x: Tensor, bias: Tensor | None, dim: int, *rest: Any, limit: int = 0) -> Config:
    """2048 elements a program, 16 a thread."""
    columns = cover(_tiled(x, bias, dim)[2][1], 2048) if x.numel() else 1
    return Config(2048 // columns, columns, 4)


def space(x: Tensor, bias: Tensor | None, dim: int, *rest: Any) -> Iterator[Config]:
    """Up to 4096 columns, 8 to 32 elements a thread."""
    width = _tiled(x, bias, dim)[2][1]
    for columns in sorted({cover(width, c) for c in (64, 256, 1024, 4096)}):
        for elements in (1024, 2048, 4096):
            for warps in (2, 4, 8):
                if columns <= elements and 8 <= elements // (32 * warps) <= 32:
                    yield Config(elements // columns, columns, warps)


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """One launch."""
    x, bias, dim, *rest = args
    if not x.numel():
        return ()
    found, (view, columns, (rows, width)) = finish("bias_act", *rest), _tiled(x, bias, dim)
    outer, channel, step = view.strides
    y_row, x_d = width if rows > 1 else 0, channel if columns else step
    size = unit(x.element_size(), outer, y_row, 0 if columns else channel)
    across = blocks(width, config.columns)
    (by, shift), (by_c, shift_c) = divider(across), divider(view.sizes[1])
    spans = [(outer, channel, x_d), (0, rows * y_row, 0)]
    values = {
        "x": Use(X),
        "bias": Use(X) if bias is None else Use(BIAS),
        "y": outs[0],
        "rows": rows, "width": width, "across": across, "by": by, "shift": shift,
        "channels": view.sizes[1], "by_c": by_c, "shift_c": shift_c,
        "x_outer": outer // size,
        "x_channel": 0 if columns else channel // size,
        "x_d": x_d,
        "y_row": y_row // size,
        "alpha": found.alpha, "gain": found.gain, "clamp": found.clamp,
        "BIAS": bias is not None,
        "ACT": found.act,
        "CLAMP": found.clamp != float("inf"),
        "COLUMNS": columns,
        "WIDE": wide((view.sizes[0], max(view.sizes[1], 2), config.columns), *spans),
        "UNIT": size,
        "ROWS": config.rows,
        "BLOCK": config.columns,
    }  # fmt: skip
    grid = (blocks(rows, config.rows) * across,)
    return (Stage(bias_act_kernel, grid, values, {"num_warps": config.num_warps}),)


def decline(x: Tensor, bias: Tensor | None, dim: int, *rest: Any) -> str | None:
    """Layouts that three strides do not reach, and 2^31 rows."""
    if not x.numel():
        return None
    view = folded(x, bias, dim)
    if view is None:
        return f"x of strides {tuple(x.stride())} is not reached by three strides"
    if view.sizes[0] * view.sizes[1] >= MANY:
        return f"{view.sizes[0] * view.sizes[1]} rows are 2^31 or more"
    return None


def small(*args: Any) -> Iterator[Config]:
    yield Config(2, 16, 1)


def specimens() -> Iterator[Named]:
    for dtype, kind in SHORT.items():
        for act in ("lrelu", "tanh"):
            args = (meta(4, 64, 512, 512, dtype=dtype), meta(64, dtype=dtype), 1, act, None, None, 256.0)
            yield f"{kind} {act}", lambda args=args: args  # type: ignore[misc]
    last = torch.empty((4, 64, 256, 256), dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    yield "bf16 softplus channels-last", lambda: (last, meta(64, dtype=torch.bfloat16), 1, "softplus", None, None, None)


TUNABLE = Tunable("bias_act", Config, key, default, space, stages, Path(__file__), small)
KERNELS = [Kernel("bias_act.triton", "cuda", decline, TUNABLE.bind)]
