"""What the launchers of rope.cpp and qk_norm_rope.cpp share."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES
from fusegen.kernels.op import FLOATS
from fusegen.kernels.strides import dense_like, merged

_STEPS = ("x_0", "x_1", "x_repeat", "out_0", "out_1", "out_repeat")
ROTATION = [
    *((name, ctypes.c_int64) for name in ("rows_0", "rows_1", "repeat", "width", *_STEPS)),
    *((name, ctypes.c_int64) for name in ("table_0", "table_1", "table_step", "entries")),
    *((name, ctypes.c_int64) for name in ("positions_0", "positions_1", "half", "full", "interleaved")),
]  # the fields of both structs from ``rows_0`` to ``interleaved``


def decline(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, rotary_dim: int | None
) -> str | None:
    """Why the kernels cannot serve these, or None."""
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if cos.dtype not in FLOATS:
        return f"the tables are {cos.dtype}"
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return "x's last dimension is strided"
    if cos.stride() != sin.stride():
        return f"cos has strides {cos.stride()} and sin {sin.stride()}"
    if rotation(x, dense_like(x, "meta"), cos, positions, interleaved, rotary_dim) is None:
        return "no two loops reach the rows of the tables"
    return None


def rotation(
    x: Tensor, out: Tensor, cos: Tensor, positions: Tensor | None, interleaved: bool, rotary_dim: int | None
) -> dict[str, int] | None:
    """The values of :data:`ROTATION` (none for an empty x); None where the rows of the tables take three loops."""
    if not x.numel():
        return {}
    lead, none = x.shape[:-1], (0,) * (x.dim() - 1)
    tables = none if positions is not None else cos.expand(*lead, cos.shape[-1]).stride()[:-1]
    places = none if positions is None else positions.expand(lead).stride()
    found = merged(lead, [out.stride()[:-1], x.stride()[:-1], tables, places])
    assert found is not None  # three dimensions are three loops
    sizes, (outs, xs, ts, ps) = found
    free = [i for i in (2, 1, 0) if sizes[i] == 1 or ts[i] == ps[i] == 0]  # loops that stay on one row of the tables
    if not free:
        return None
    r = max(free, key=lambda i: (sizes[i] > 1, i))
    a, b = (i for i in range(3) if i != r)
    width = x.shape[-1] if rotary_dim is None else rotary_dim
    sizes_and_steps = (sizes[a], sizes[b], sizes[r], x.shape[-1], xs[a], xs[b], xs[r], outs[a], outs[b], outs[r])
    table = (ts[a], ts[b], cos.stride(-1), 0) if positions is None else (cos.stride(0), 0, cos.stride(-1), cos.shape[0])
    turn = (ps[a], ps[b], width // 2, int(cos.shape[-1] == width), int(interleaved))
    return dict(zip((name for name, _ in ROTATION), (*sizes_and_steps, *table, *turn), strict=True))


def dtypes(x: Tensor, cos: Tensor, positions: Tensor | None) -> dict[str, int]:
    """The structs' fields of those names."""
    places = torch.int64 if positions is None else positions.dtype
    return {"dtype": DTYPES[x.dtype], "table_dtype": DTYPES[cos.dtype], "positions_dtype": DTYPES[places]}
