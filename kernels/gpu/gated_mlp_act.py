"""up * act(gate) on NVIDIA GPUs: a tile of rows and columns a program."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gated_mlp_act import check, loops
from fusegen.kernels.gpu.activation import sigmoid
from fusegen.kernels.gpu.counting import MANY, cover, divider, indices, quotient, three, wide
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, meta, unit
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.op import Kernel

X, UP = 0, 1  # positions of the tensors in the schema


@triton.jit
def normal_below(x):
    """The normal distribution's Phi(x) without the cancellation of 1 + erf: a polynomial in t = 1 / (1 + 0.29 |x|) of
    degree 6 (a minimax fit: 1.4e-7 of the larger of Phi(-|x|) and 0.02) times e^(-x^2 / 2), half the instructions."""
    r = tl.rsqrt(1.0 + 0.29 * tl.abs(x))
    t = r * r
    q = 0.289661471 - 0.0900876719 * t
    q = q * t - 0.100104624
    q = q * t + 0.184273561
    q = q * t + 0.0992214575
    q = q * t + 0.117036033
    q = q * t * tl.exp2(-0.7213475204444817 * x * x)
    return tl.where(x < 0.0, q, 1.0 - q)


@triton.jit
def gated_mlp_act_kernel(
    x, up, y, rows, width, across, by, shift, n1, n2, by1, shift1, by2, shift2, x0, x1, x2, x_d, u0, u1, u2, u_d, y_row,
    gate_at, up_at,
    ACT: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS x BLOCK of the output a program, ``across`` programs a row; x and up have three row strides, y has one, in
    multiples of UNIT."""
    program = tl.program_id(0)
    tile = quotient(program, by, shift)
    first = (program - tile * across).to(tl.int64) * BLOCK
    row, d = tile * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    keep = (row < rows) & (d < tl.minimum(width - first, BLOCK).to(tl.int32))
    i0, i1, i2 = indices(row, n1, n2, by1, shift1, by2, shift2, FLAT, WIDE)
    row, d = (row.to(tl.int64), d.to(tl.int64)) if WIDE else (row, d)
    at = (i0 * x0 + i1 * x1 + i2 * x2 + gate_at) * UNIT + d * x_d
    g = tl.load(x + first * x_d + at, mask=keep, other=0.0).to(tl.float32)
    at = (i0 * u0 + i1 * u1 + i2 * u2 + up_at) * UNIT + d * u_d
    u = tl.load(up + first * u_d + at, mask=keep, other=0.0).to(tl.float32)
    if ACT == "silu":
        out = g * sigmoid(g)
    elif ACT == "gelu":
        out = g * normal_below(g)
    elif ACT == "gelu_tanh":
        out = g * sigmoid(g * (1.5957691216057308 + 0.07135481282724184 * g * g))
    elif ACT == "relu":
        out = tl.where(g < 0.0, 0.0, g)  # NaN stays
    elif ACT == "sigmoid":
        out = sigmoid(g)
    else:
        out = g * sigmoid(1.702 * g)
    tl.store(y + first + (row * y_row * UNIT + d), (out * u).to(y.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class Config:
    """A tile of ``rows`` x ``columns``, and its warps."""

    rows: int
    columns: int
    num_warps: int


def _width(x: Tensor, up: Tensor | None) -> int:
    """The length of the innermost loop."""
    found = loops(x, up, True) if x.numel() else None
    return found[0][-1] if found else 1


def key(x: Tensor, up: Tensor | None, activation: str, gate_first: bool) -> str:
    """The row's length, whether it is cut out of another, its dtype and the activation."""
    apart = "" if up is None else " of two"
    return f"{x.shape[-1]}{apart} {str(x.dtype).removeprefix('torch.')} {activation}"


def default(x: Tensor, up: Tensor | None = None, *rest: Any, limit: int = 0) -> Config:
    """2048 elements a program, 16 a thread."""
    columns = cover(_width(x, up), 2048)
    return Config(2048 // columns, columns, 4)


def space(x: Tensor, up: Tensor | None = None, *rest: Any) -> Iterator[Config]:
    """Up to 4096 columns, 8 to 32 elements a thread."""
    width = _width(x, up)
    for columns in sorted({cover(width, c) for c in (256, 512, 1024, 2048, 4096)}):
        for rows in (1, 2, 4, 8):
            for warps in (1, 2, 4, 8):
                if 8 <= rows * columns // (32 * warps) <= 32:
                    yield Config(rows, columns, warps)


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """One launch."""
    x, up, activation, gate_first = args
    (out,) = outs
    if not out.numel():
        return ()
    found = loops(x, up, gate_first)
    assert found is not None
    (*sizes, width), (_, xs, us) = found
    rows, half = math.prod(sizes), 0 if up is not None else out.shape[-1] * x.stride(-1)
    gate_at, up_at = (0, half) if gate_first else (half, 0)
    y_row = width if rows > 1 else 0
    size = unit(x.element_size(), *xs[:3], *us[:3], y_row, half)
    across = blocks(width, config.columns)
    by, shift = divider(across)
    spans = [(*steps[:3], half, steps[3]) for steps in (xs, us)] + [(0, 0, 0, rows * y_row, 0)]
    values = {
        "x": Use(X),
        "up": Use(X) if up is None else Use(UP),
        "y": out,
        "rows": rows, "width": width, "across": across, "by": by, "shift": shift,
        **three(*sizes),
        **{f"x{i}": step // size for i, step in enumerate(xs[:3])},
        **{f"u{i}": step // size for i, step in enumerate(us[:3])},
        "x_d": xs[3],
        "u_d": us[3],
        "y_row": y_row // size,
        "gate_at": gate_at // size,
        "up_at": up_at // size,
        "ACT": activation,
        "WIDE": wide((*sizes, 2, config.columns), *spans),
        "UNIT": size,
        "ROWS": config.rows,
        "BLOCK": config.columns,
    }  # fmt: skip
    grid = (blocks(rows, config.rows) * across,)
    return (Stage(gated_mlp_act_kernel, grid, values, {"num_warps": config.num_warps}),)


def decline(x: Tensor, up: Tensor | None = None, activation: str = "silu", gate_first: bool = True) -> str | None:
    """Layouts that need more than four strides, and 2^31 rows."""
    check(x, up, activation)
    found = loops(x, up, gate_first) if x.numel() else ((0,), [])
    if found and math.prod(found[0][:3]) >= MANY:
        return f"{math.prod(found[0][:3])} rows are 2^31 or more"
    if found is None:
        return (
            f"strides {tuple(x.stride())} and {tuple(up.stride()) if up is not None else ()} are more than four loops"
        )
    return None


def small(*args: Any) -> Iterator[Config]:
    yield Config(2, 16, 1)


def specimens() -> Iterator[Named]:
    for dtype, kind in SHORT.items():
        wide, gate = meta(2, 4096, 2560, dtype=dtype), meta(1, 512, 14336, dtype=dtype)
        yield f"{kind} geglu 1280", lambda x=wide: (x, None, "gelu", False)  # type: ignore[misc]
        yield f"{kind} swiglu 14336", lambda x=gate: (x, x, "silu", True)  # type: ignore[misc]
        yield f"{kind} gelu_tanh 14336", lambda x=gate: (x, x, "gelu_tanh", True)  # type: ignore[misc]


TUNABLE = Tunable("gated_mlp_act", Config, key, default, space, stages, Path(__file__), small)
KERNELS = [Kernel("gated_mlp_act.triton", "cuda", decline, TUNABLE.bind)]
