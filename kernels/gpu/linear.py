"""The linear layer of few rows on NVIDIA GPUs: sixteen rows of x at a time in the matrix units, or four in float32.

Tiles are chosen by the weight's shape alone and sums are added up in the same order for every row, so that a row's bits
are its own.
"""

# mypy: disable-error-code="assignment, var-annotated"
# Triton's tuples grow in unrolled loops, which a type of Python's does not.
from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, meta, power
from fusegen.kernels.gpu.quantized import finished, tail
from fusegen.kernels.gpu.tune import SHARED_BYTES, Tunable
from fusegen.kernels.op import FLOATS, Kernel
from fusegen.kernels.rows import rows_of

WEIGHT, BIAS, RESIDUAL, MULTIPLIER = 1, 2, 3, 5  # positions of the tensors in the schema
ROWS = 16  # the fewest that a product in the matrix units takes
DEEP = (  # tiles of many steps
    (16, 256, 2, 5), (16, 256, 4, 5), (16, 512, 4, 4), (32, 128, 4, 6), (32, 256, 4, 4), (32, 256, 4, 5),
    (32, 256, 8, 5), (32, 512, 4, 3), (32, 512, 8, 4), (64, 128, 4, 6), (64, 256, 4, 3), (64, 256, 8, 4),
)  # fmt: skip
EXACT = 4  # rows of float32, which has no matrix units here, by what a thread's registers hold


@triton.jit
def linear_kernel(
    x, weight, bias, residual, multiplier, out, rows, n, k, inner, x_outer, x_inner, x_d,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, MULTIPLIER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows by BLOCK_N columns of the output."""
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_K)
    x_at = x + ((m // inner) * x_outer + (m % inner) * x_inner)[:, None]
    w_at = weight + c.to(tl.int64)[None, :] * k
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        column = start + d
        inside = (m < rows)[:, None] & (column < k)[None, :]
        a = tl.load(x_at + column.to(tl.int64)[None, :] * x_d, mask=inside, other=0.0)
        b = tl.load(w_at + column[:, None], mask=(c < n)[None, :] & (column < k)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    keep, at = (m < rows)[:, None] & (c < n)[None, :], m[:, None] * n + c[None, :]
    _store(acc, bias, residual, multiplier, out, at, c[None, :], keep, BIAS, RESIDUAL, ACTIVATION, MULTIPLIER)


@triton.jit
def exact_kernel(
    x, weight, bias, residual, multiplier, out, rows, n, k, inner, x_outer, x_inner, x_d,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, MULTIPLIER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same in float32: the weight goes from memory to registers once, and each keeps the sums of its columns until
    the end.  BLOCK_M is a row count of any x, so that the same code serves them all."""
    c, d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    w_at = weight + tl.minimum(c, n - 1).to(tl.int64)[:, None] * k
    acc, x_at = (), ()
    for m in tl.static_range(BLOCK_M):
        row = tl.program_id(1).to(tl.int64) * BLOCK_M + m
        x_at += (x + (row // inner) * x_outer + (row % inner) * x_inner,)
        acc += (tl.zeros((BLOCK_N, BLOCK_K), tl.float32),)
    for start in range(0, k, BLOCK_K):
        column, new = start + d, ()
        w = tl.load(w_at + column[None, :], mask=(column < k)[None, :], other=0.0)
        for m in tl.static_range(BLOCK_M):
            inside = (column < k) & (tl.program_id(1) * BLOCK_M + m + tl.zeros_like(d) < rows)
            a = tl.load(x_at[m] + column.to(tl.int64) * x_d, mask=inside, other=0.0)
            new += (tl.fma(w, tl.broadcast_to(a[None, :], (BLOCK_N, BLOCK_K)), acc[m]),)
        acc = new
    for m in tl.static_range(BLOCK_M):
        row = tl.program_id(1).to(tl.int64) * BLOCK_M + m
        total, at, keep = tl.sum(acc[m], axis=1), row * n + c, (c < n) & (row + tl.zeros_like(c) < rows)
        _store(total, bias, residual, multiplier, out, at, c, keep, BIAS, RESIDUAL, ACTIVATION, MULTIPLIER)


@triton.jit
def _store(
    y, bias, residual, multiplier, out, at, column, keep,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, MULTIPLIER: tl.constexpr,
):  # fmt: skip
    """act(y + bias + residual) * multiplier to where y's elements lie in the output."""
    if RESIDUAL:
        y += tl.load(residual + at, mask=keep, other=0.0).to(tl.float32)
    y = finished(y, bias, residual, at, column, keep, BIAS, False, ACTIVATION)
    if MULTIPLIER:
        y *= tl.load(multiplier + at, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class Config:
    """A tile of ``block_n`` rows of the weight, ``block_k`` columns a step."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def key(x: Tensor, weight: Tensor, *rest: Any) -> str:
    """The weight's shape, and whether it is float32: what is chosen must not depend on the rows."""
    return f"{weight.shape[0]}x{weight.shape[1]}{' fp32' if x.dtype == torch.float32 else ''}"


def default(x: Tensor, weight: Tensor, *rest: Any, limit: int = SHARED_BYTES) -> Config:
    """Narrow tiles, so that there are many, and enough steps ahead that a multiprocessor waits for 64 KiB or more.  One
    step alone goes through registers: to ask for steps ahead costs half as many instructions again."""
    n, k = weight.shape
    if x.dtype == torch.float32:
        return Config(8, max(16, min(512, power(k))), 4, 1)
    deep = max(16, min(256, power(k)))
    if k <= deep:
        return Config(16, deep, 4, 1)
    if n < 128 * 32:  # too few rows to go round in tiles of 32
        return Config(16, deep, 4, 4)
    return Config(32, deep, 4, 5 if n <= 132 * 32 and limit >= SHARED_BYTES else 4)


def space(x: Tensor, weight: Tensor, *rest: Any) -> Iterator[Config]:
    """Narrow tiles, of all depths where K is long."""
    if x.dtype == torch.float32:
        yield from (Config(n, 128 * warps, warps, 1) for n in (4, 8, 16) for warps in (2, 4, 8))
        return
    if weight.shape[1] <= 1024:  # a few steps, or one
        steps = ((max(16, power(weight.shape[1])), 1), (256, 4), (128, 5))
        yield from (Config(n, step, warps, depth) for n in (16, 32) for warps in (2, 4) for step, depth in steps)
        return
    yield from itertools.starmap(Config, DEEP)


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """One launch."""
    x, weight, bias, residual, activation, multiplier = args
    rows, (n, k) = math.prod(x.shape[:-1]), weight.shape
    if not outs[0].numel():
        return ()
    found = rows_of([x])
    assert found is not None
    ((outer, inner),) = found.strides
    kernel, height = (exact_kernel, EXACT) if x.dtype == torch.float32 else (linear_kernel, ROWS)
    values = tail(bias, residual, activation, (BIAS, RESIDUAL)) | {
        "x": Use(0), "weight": Use(WEIGHT), "out": outs[0], "rows": rows, "n": n, "k": k, "inner": found.inner,
        "multiplier": Use(0) if multiplier is None else Use(MULTIPLIER), "MULTIPLIER": multiplier is not None,
        "x_outer": outer, "x_inner": inner, "x_d": x.stride(-1),
        "BLOCK_M": height, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return (Stage(kernel, (blocks(n, config.block_n), blocks(rows, height)), values, options),)


def decline(x: Tensor, weight: Tensor, bias: Any, residual: Any, activation: str, multiplier: Any) -> str | None:
    """Arguments that need more than two strides or are not dense."""
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if x.numel() and rows_of([x]) is None:
        return f"the rows of strides {tuple(x.stride()[:-1])} need more than two strides"
    for name, tensor in {"weight": weight, "bias": bias, "residual": residual, "multiplier": multiplier}.items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} is strided"
    return None


def small(x: Tensor, *rest: Any) -> Iterator[Config]:
    yield Config(16, 32, 4, 2)


def specimens() -> Iterator[Named]:
    """One row and sixteen in each dtype, and all that may follow."""
    for dtype, kind in SHORT.items():
        for m in (1, 16):
            args = (meta(m, 1, 4096, dtype=dtype), meta(4096, 4096, dtype=dtype), None, None, "none", None)
            yield f"{kind} {m}x4096x4096", lambda args=args: args  # type: ignore[misc]
    x, weight, more = (meta(*s, dtype=torch.bfloat16) for s in ((4, 1, 256), (640, 256), (4, 1, 640)))
    yield "bf16 4x640x256 all", lambda: (x, weight, meta(640), more, "silu", more)


TUNABLE = Tunable("linear", Config, key, default, space, stages, Path(__file__), small)
KERNELS = [Kernel("linear.triton", "cuda", decline, TUNABLE.bind)]
