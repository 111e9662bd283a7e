"""Layer normalization on NVIDIA GPUs: whole rows in registers, several to a program where they are short."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, meta, power
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.op import Kernel

X, WEIGHT, BIAS = 0, 1, 2  # positions of the tensors in the schema
WIDEST = 32768  # the longest row held in the registers of 32 warps


@triton.jit
def layer_norm_kernel(
    x, weight, bias, y, rows, inner, width, x_outer, x_inner, x_d, eps,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program; row r of x starts at (r // inner) * x_outer + (r % inner) * x_inner; y is contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    keep = (row < rows) & (d < width)
    start = (row // inner) * x_outer + (row % inner) * x_inner
    tile = tl.load(x + start + d * x_d, mask=keep, other=0.0).to(tl.float32)
    count = tl.cast(width, tl.float32)
    mean = (tl.sum(tile, axis=1) / count)[:, None]
    centred = tl.where(keep, tile - mean, 0.0)
    out = centred / tl.sqrt((tl.sum(centred * centred, axis=1) / count)[:, None] + eps)
    if WEIGHT:
        out = out * tl.load(weight + d, mask=d < width, other=0.0).to(tl.float32)
    if BIAS:
        out = out + tl.load(bias + d, mask=d < width, other=0.0).to(tl.float32)
    tl.store(y + row * width + d, out.to(y.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class Config:
    """``rows`` a program, and its warps."""

    rows: int
    num_warps: int


def lead(x: Tensor) -> tuple[int, int, int, int] | None:
    """The leading dimensions as at most two: (rows, inner, outer stride, inner stride), or None where it takes more."""
    dims: list[list[int]] = []  # innermost first: [size, stride]
    for n, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if n == 1:
            continue
        if dims and step == dims[-1][0] * dims[-1][1]:
            dims[-1][0] *= n
        else:
            dims.append([n, step])
    if len(dims) > 2:
        return None
    (inner, step), (outer, far) = ([*dims, [1, 0], [1, 0]])[:2]
    return inner * outer, inner, far, step


def key(x: Tensor, weight: Any, bias: Any, eps: float) -> str:
    """The row's length and dtype; nothing else moves the choice."""
    return f"{x.shape[-1]} {str(x.dtype).removeprefix('torch.')}"


def default(x: Tensor, *rest: Any, limit: int = 0) -> Config:
    """About 1024 elements a program, one warp for every 512 of them."""
    block = power(x.shape[-1])
    rows = max(1, min(16, 1024 // block))
    return Config(rows, max(1, min(32, rows * block // 512)))


def space(x: Tensor, *rest: Any) -> Iterator[Config]:
    """1 to 16 rows, with 4 to 64 elements a thread."""
    for rows in (1, 2, 4, 8, 16):
        for warps in (1, 2, 4, 8, 16, 32):
            if 4 <= rows * power(x.shape[-1]) // (32 * warps) <= 64:
                yield Config(rows, warps)


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """One launch."""
    x, weight, bias, eps = args
    if not x.numel():
        return ()
    found = lead(x)
    assert found is not None
    rows, inner, outer_stride, inner_stride = found
    values = {
        "x": Use(X),
        "weight": Use(X) if weight is None else Use(WEIGHT),
        "bias": Use(X) if bias is None else Use(BIAS),
        "y": outs[0],
        "rows": rows,
        "inner": inner,
        "width": x.shape[-1],
        "x_outer": outer_stride,
        "x_inner": inner_stride,
        "x_d": x.stride(-1),
        "eps": eps,
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "ROWS": config.rows,
        "BLOCK": power(x.shape[-1]),
    }
    return (Stage(layer_norm_kernel, (blocks(rows, config.rows),), values, {"num_warps": config.num_warps}),)


def decline(x: Tensor, *rest: Any) -> str | None:
    """Rows too long for registers, and leading dimensions that need more than two strides."""
    if x.shape[-1] > WIDEST:
        return f"a row of {x.shape[-1]} does not fit a block's registers (limit {WIDEST})"
    if x.numel() and lead(x) is None:
        return f"the rows of strides {tuple(x.stride()[:-1])} need more than two strides"
    return None


def small(*args: Any) -> Iterator[Config]:
    yield Config(4, 4)


def specimens() -> Iterator[Named]:
    for dtype, kind in SHORT.items():
        for width in (160, 1280, 5120):
            parameter = meta(width, dtype=dtype)
            args = (meta(4096, width, dtype=dtype), parameter, parameter, 1e-5)
            yield f"{kind} {width}", lambda args=args: args  # type: ignore[misc]


TUNABLE = Tunable("layer_norm", Config, key, default, space, stages, Path(__file__), small)
KERNELS = [Kernel("layer_norm.triton", "cuda", decline, TUNABLE.bind)]
