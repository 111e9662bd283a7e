"""up * act(gate) on NVIDIA GPUs: a tile of rows and columns a program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gated_mlp_act import check, loops
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, meta, power, unit
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.op import Kernel

X, UP = 0, 1  # positions of the tensors in the schema


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def gated_mlp_act_kernel(
    x, up, y, rows, width, n1, n2, x0, x1, x2, x_d, u0, u1, u2, u_d, gate_at, up_at,
    ACT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS x BLOCK of the output a program; y is contiguous, x and up have three row strides, in multiples of UNIT."""
    program = tl.program_id(0).to(tl.int64)
    across = tl.cdiv(width, BLOCK)
    row = program // across * ROWS + tl.arange(0, ROWS)[:, None]
    d = program % across * BLOCK + tl.arange(0, BLOCK)[None, :]
    keep = (row < rows) & (d < width)
    i0, i1, i2 = row // n2 // n1, row // n2 % n1, row % n2
    at = (i0 * x0 + i1 * x1 + i2 * x2 + gate_at) * UNIT + d * x_d
    g = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    at = (i0 * u0 + i1 * u1 + i2 * u2 + up_at) * UNIT + d * u_d
    u = tl.load(up + at, mask=keep, other=0.0).to(tl.float32)
    if ACT == "silu":
        out = g * sigmoid(g)
    elif ACT == "gelu":
        out = 0.5 * g * (1.0 + tl.math.erf(g * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        out = g * sigmoid(1.5957691216057308 * g * (1.0 + 0.044715 * g * g))
    elif ACT == "relu":
        out = tl.where(g < 0.0, 0.0, g)  # NaN stays
    elif ACT == "sigmoid":
        out = sigmoid(g)
    else:
        out = g * sigmoid(1.702 * g)
    tl.store(y + row * width + d, (out * u).to(y.dtype.element_ty), mask=keep)


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
    """1024 elements a program, 8 a thread."""
    columns = min(1024, power(_width(x, up)))
    return Config(max(1, 1024 // columns), columns, 4)


def space(x: Tensor, up: Tensor | None = None, *rest: Any) -> Iterator[Config]:
    """Up to 4096 columns, 8 to 32 elements a thread."""
    widest = power(_width(x, up))
    for columns in sorted({min(widest, c) for c in (256, 512, 1024, 2048, 4096)}):
        for rows in (1, 2, 4, 8):
            for warps in (1, 2, 4, 8, 16):
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
    (n0, n1, n2, width), (_, (x0, x1, x2, x_d), (u0, u1, u2, u_d)) = found
    half = 0 if up is not None else out.shape[-1] * x.stride(-1)
    starts = (0, half) if gate_first else (half, 0)
    size = unit(x.element_size(), x0, x1, x2, u0, u1, u2, *starts)
    values = {
        "x": Use(X),
        "up": Use(X) if up is None else Use(UP),
        "y": out,
        "rows": n0 * n1 * n2,
        "width": width,
        "n1": n1,
        "n2": n2,
        **{name: step // size for name, step in zip(("x0", "x1", "x2", "u0", "u1", "u2"),
                                                     (x0, x1, x2, u0, u1, u2), strict=True)},
        "x_d": x_d,
        "u_d": u_d,
        "gate_at": starts[0] // size,
        "up_at": starts[1] // size,
        "ACT": activation,
        "UNIT": size,
        "ROWS": config.rows,
        "BLOCK": config.columns,
    }  # fmt: skip
    grid = (blocks(n0 * n1 * n2, config.rows) * blocks(width, config.columns),)
    return (Stage(gated_mlp_act_kernel, grid, values, {"num_warps": config.num_warps}),)


def decline(x: Tensor, up: Tensor | None = None, activation: str = "silu", gate_first: bool = True) -> str | None:
    """Layouts that need more than four strides."""
    check(x, up, activation)
    if x.numel() and loops(x, up, gate_first) is None:
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
