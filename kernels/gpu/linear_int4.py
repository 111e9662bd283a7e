"""The 4-bit linear layer on NVIDIA GPUs: weights are unpacked in registers, on their way into the matrix units.

The weight is the left operand, so that few rows of x still fill a matrix instruction.  K is cut into segments and, of
four each, splits by the weight's shape alone (:func:`plan_k`).  Few rows of x have a program for each split and a
launch that adds their sums in order; many take the splits one after another and add the same sums in the same order.

Where ``inputs`` is "int8", a group's sum is an exact integer, and these are added up in a segment, segments in a split
and splits in order, each from zero and with one rounding: so a row's bits depend neither on the configuration nor on
other rows, and the fewest rows have a kernel of their own (:mod:`.few_rows_int4`), which no matrix unit would help.
Where it is "float", they are those of the matrix units' sum over a step, which no choice here reorders.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu import few_rows_int4
from fusegen.kernels.gpu.few_rows_int4 import LANES, UNIT, Config
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, meta, power
from fusegen.kernels.gpu.quantized import finished, quantize_stage, scratch, tail, unserved
from fusegen.kernels.gpu.tune import SHARED_BYTES, Tunable
from fusegen.kernels.linear_int4 import ROWS, WORD, group_of
from fusegen.kernels.op import Kernel
from fusegen.kernels.rows import rows_of

WEIGHT, SCALES, ZEROS, BIAS, RESIDUAL = 1, 2, 4, 5, 6  # positions of the tensors in the schema
FILL = 132  # programs that keep a GPU busy without splits of K: one for each multiprocessor of an H100
TILE_N = 64
FEW = 16  # the most rows that may be multiplied outside of the matrix units


@triton.jit
def _nibble(words, zero, PLACE: tl.constexpr):
    """Four bits of words less ``zero``.  They become bits of a float of 2^23, which takes no conversion, and lie where
    they did, which takes no shift."""
    code = ((words & (15 << PLACE)) | 0x4B000000).to(tl.float32, bitcast=True)
    return tl.fma(
        code, tl.full(code.shape, 2.0**-PLACE, tl.float32), -(2.0 ** (23 - PLACE)) - zero + tl.zeros_like(code)
    )


@triton.jit
def _nibbles(words, zero):
    """All eight of each word in the order of their columns: (..., 2, 2, 2), a word's in one thread."""
    upper = words >> 16
    even = tl.join(
        tl.join(_nibble(words, zero, 0), _nibble(words, zero, 4)),
        tl.join(_nibble(upper, zero, 0), _nibble(upper, zero, 4)),
    )
    odd = tl.join(
        tl.join(_nibble(words, zero, 8), _nibble(words, zero, 12)),
        tl.join(_nibble(upper, zero, 8), _nibble(upper, zero, 12)),
    )
    return tl.join(even, odd)


@triton.jit
def product_kernel(
    x, scale_x, weight, scales, zeros, bias, residual, out, sums,
    rows, n, width, padded, span, splits, inner, x_outer, x_inner, x_d,
    ZEROS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, INT8: tl.constexpr,
    PARTIAL: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A (BLOCK_N, BLOCK_M) tile of the output transposed or, where PARTIAL, of the sums (splits, rows, n) of one split.
    x is codes (rows, padded) with scale_x (rows, groups) where INT8, SHARE groups a segment; else its rows have two
    strides.  The weight's codes less their zero points are exact in x's dtype: scales come behind the products.  16 and
    8 are the rows of a panel and the columns of a word."""
    tiles_m, groups = tl.cdiv(rows, BLOCK_M), padded // GROUP
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tl.program_id(0) // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    wide = m.to(tl.int64)
    x_at = x + (wide // inner) * x_outer + (wide % inner) * x_inner
    panel, near = (c // 16).to(tl.int64), c % 16
    w_at = weight + panel * (padded // 8) * 16 + near
    g_at = panel * groups * 16 + near
    word, d = tl.arange(0, BLOCK_K // 8), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = tl.program_id(1) if PARTIAL else 0
    for split in range(first, first + 1 if PARTIAL else splits):
        unit = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for start in range(split * span, tl.minimum(split * span + span, padded), BLOCK_K):
            g = start // GROUP
            words = tl.load(w_at[:, None] + (start // 8 + word)[None, :] * 16, mask=(c < n)[:, None], other=0)
            zero = tl.load(zeros + g_at + g * 16, mask=c < n, other=0).to(tl.float32)[:, None] if ZEROS else 8.0
            scale = tl.load(scales + g_at + g * 16, mask=c < n, other=0.0).to(tl.float32)[:, None]
            inside = (m < rows)[:, None] & (start + d < width)[None, :]
            tile = tl.load(x_at[:, None] + (start + d).to(tl.int64)[None, :] * x_d, mask=inside, other=0)
            left = tl.reshape(_nibbles(words, zero), (BLOCK_N, BLOCK_K)).to(tile.dtype)
            dots = tl.dot(left, tl.trans(tile), input_precision="ieee")
            if INT8:
                scale = scale * tl.load(scale_x + wide * groups + g, mask=m < rows, other=0.0)[None, :]
            part = tl.fma(dots, tl.broadcast_to(scale, (BLOCK_N, BLOCK_M)), part)
            if INT8 and (start // BLOCK_K + 1) % SHARE == 0:
                unit += part
                part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        total += unit + part
    keep, at = (c < n)[:, None] & (m < rows)[None, :], wide[None, :] * n + c[:, None]
    if PARTIAL:
        tl.store(sums + tl.cast(first, tl.int64) * rows * n + at, total, mask=keep)
    else:
        y = finished(total, bias, residual, at, c[:, None], keep, BIAS, RESIDUAL, ACTIVATION)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=keep)


@triton.jit
def finish_kernel(
    sums, bias, residual, out, rows, n, splits,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row of the output: its sums added in order."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep, at = c < n, row * n + c
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(splits):
        total += tl.load(sums + tl.cast(rows, tl.int64) * s * n + at, mask=keep, other=0.0)
    y = finished(total, bias, residual, at, c, keep, BIAS, RESIDUAL, ACTIVATION)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=keep)


def plan_k(x: Tensor, weight: Tensor, scales: Tensor, out_features: int, *rest: Any) -> tuple[int, int, int]:
    """(columns a step, groups a segment, splits): by the weight's shape and dtypes, never by the rows of x."""
    group = group_of(weight, scales)
    step = 32 if x.dtype == torch.float32 and rest[-1] == "float" else group
    share = max(1, blocks(scales.shape[1], LANES))
    return step, share, blocks(scales.shape[1], share * UNIT)


def key(x: Tensor, weight: Tensor, scales: Tensor, out_features: int, *rest: Any) -> str:
    """Rows to the next power of two, which move tiles alone, the weight's shape, its groups, and x's dtype."""
    kind = "int8" if rest[-1] == "int8" else str(x.dtype).removeprefix("torch.")
    return f"{power(math.prod(x.shape[:-1]))} {out_features}x{weight.shape[1] * WORD} {group_of(weight, scales)} {kind}"


def default(x: Tensor, weight: Tensor, scales: Tensor, *rest: Any, limit: int = SHARED_BYTES) -> Config:
    """As many rows of x as there are, up to 128."""
    rows = math.prod(x.shape[:-1])
    if rest[-1] == "int8" and rows * group_of(weight, scales) <= 32 * FEW:  # scales are what matrix units wait for
        return few_rows_int4.default(rows, weight, scales)
    if x.dtype == torch.float32 and rest[-1] == "float":  # without matrix units, operands lie in registers
        return Config(16, TILE_N, 8, 2)
    if rows > 64:
        return Config(128 if limit >= SHARED_BYTES else 64, TILE_N, 8, 3)
    return Config(max(16, min(64, power(rows))), TILE_N, 4, 4 if limit >= SHARED_BYTES else 3)


def space(x: Tensor, weight: Tensor, scales: Tensor, *rest: Any) -> Iterator[Config]:
    """16 to 128 rows of x by 64 or 128 of the weight; few rows of x without matrix units."""
    rows, exact = math.prod(x.shape[:-1]), x.dtype == torch.float32 and rest[-1] == "float"
    if rows <= FEW and rest[-1] == "int8":
        yield from few_rows_int4.space(rows, weight, scales)
    heights = [h for h in (16, 32, 64, 128) if h <= 2 * power(rows) or h == 16]
    for block_m, block_n, warps, depth in itertools.product(heights, (64, 128), (4, 8), (2, 3, 4, 5)):
        if exact and (block_m > 32 or depth > 3):
            continue
        if block_m * block_n <= 64 * 32 * warps:
            yield Config(block_m, block_n, warps, depth)


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """Codes of x where they are wanted, products, and the sum of the splits where they are apart."""
    x, weight, scales, n, zeros, bias, residual, activation, inputs = args
    rows, padded, group = math.prod(x.shape[:-1]), weight.shape[1] * WORD, group_of(weight, scales)
    if not outs[0].numel():
        return ()
    step, share, splits = plan_k(*args)
    common = tail(bias, residual, activation, (BIAS, RESIDUAL)) | {"out": outs[0], "rows": rows, "n": n}
    values = common | {"weight": Use(WEIGHT), "scales": Use(SCALES), "zeros": Use(SCALES if zeros is None else ZEROS)}
    values |= {"ZEROS": zeros is not None, "GROUP": group, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    # The matrix units take codes in bfloat16, which holds them: their sums are as exact, and nibbles become so sooner.
    kind = None if inputs == "float" or config.fused else torch.int8 if config.words else torch.bfloat16
    before, given = _inputs(x, padded, group, kind)
    if config.words:
        return (*before, few_rows_int4.stage(values | given | {"share": share}, scales, config))
    tiles = blocks(rows, config.block_m) * blocks(n, config.block_n)
    apart = splits > 1 and tiles < FILL
    common["sums"] = scratch(x, splits, rows, n, dtype=torch.float32) if apart else outs[0]
    values |= given | {"sums": common["sums"], "padded": padded, "SHARE": share, "splits": splits}
    values |= {"span": share * UNIT * group, "INT8": inputs == "int8", "PARTIAL": apart, "BLOCK_K": step}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": False}
    made = [*before, Stage(product_kernel, (tiles, splits if apart else 1), values, options)]
    if apart:
        block = min(1024, power(n))
        last = common | {"splits": splits, "BLOCK": block}
        made.append(Stage(finish_kernel, (rows, blocks(n, block)), last, {"num_warps": 4, "enable_fp_fusion": False}))
    return tuple(made)


def _inputs(x: Tensor, padded: int, group: int, kind: torch.dtype | None) -> tuple[list[Stage], dict[str, Any]]:
    """What comes before the product, to make codes of x of that dtype, and the parameters that say where its x lies."""
    rows = math.prod(x.shape[:-1])
    if kind is not None:
        codes = scratch(x, rows, padded, dtype=kind)
        scale = scratch(x, rows, padded // group, dtype=torch.float32)
        before = [quantize_stage(x, codes, scale, group)] if padded else []
        where = (rows, 0, padded, 1)
        return before, {"x": codes, "scale_x": scale, "width": padded} | _strides(where)
    found = rows_of([x])
    assert found is not None
    where = (found.inner, *found.strides[0], x.stride(-1))
    return [], {"x": Use(0), "scale_x": Use(0), "width": x.shape[-1]} | _strides(where)


def _strides(where: tuple[int, int, int, int]) -> dict[str, int]:
    return dict(zip(("inner", "x_outer", "x_inner", "x_d"), where, strict=True))


def decline(
    x: Tensor, weight: Tensor, scales: Tensor, out_features: int, zeros: Any, bias: Any, residual: Any, *rest: Any
) -> str | None:
    """Arguments that need more than two strides or are not dense."""
    return unserved(x, 0, bias, residual, weight=weight, scales=scales, zeros=zeros)


def small(x: Tensor, weight: Tensor, scales: Tensor, *rest: Any) -> Iterator[Config]:
    yield Config(16, 32, 4, 2)
    if rest[-1] == "int8":
        yield Config(8, 32, 8, 2, group_of(weight, scales) // WORD)


def specimens() -> Iterator[Named]:
    """Both kinds of inputs by dtype, groups, zero points, one row, few and many."""
    for dtype, kind in SHORT.items():
        yield _specimen(f"{kind} 1x4096x4096 float", dtype, 1, 128, inputs="float")
    bf16 = torch.bfloat16
    yield _specimen("bf16 512x4096x4096 float", bf16, 512, 128, inputs="float")
    yield _specimen("bf16 16x4096x4096 float zeros groups of 32", bf16, 16, 32, zeros=True, inputs="float")
    yield _specimen("bf16 1x4096x4096 int8 groups of 32", bf16, 1, 32)
    yield _specimen("bf16 16x4096x4096 int8 zeros", bf16, 16, 128, zeros=True)
    yield _specimen("bf16 4x4096x4096 int8 zeros groups of 32", bf16, 4, 32, zeros=True)
    yield _specimen("bf16 16x4096x4096 int8 groups of 32", bf16, 16, 32)
    yield _specimen("bf16 1x4096x11008 int8 groups of 32", bf16, 1, 32, k=11008)
    yield _specimen("bf16 1x4096x14336 int8", bf16, 1, 128, k=14336)
    yield _specimen("bf16 64x4096x4096 int8", bf16, 64, 128)
    yield _specimen("bf16 512x4096x4096 int8", bf16, 512, 128)


def _specimen(
    name: str, dtype: torch.dtype, m: int, group: int, zeros: bool = False, inputs: str = "int8", k: int = 4096
) -> Named:
    n = 4096
    weight, scales = (
        meta(n // ROWS, k // WORD, ROWS, dtype=torch.int32),
        meta(n // ROWS, k // group, ROWS, dtype=torch.float16),
    )
    points = meta(*scales.shape, dtype=torch.uint8) if zeros else None
    return name, lambda: (meta(1, m, k, dtype=dtype), weight, scales, n, points, None, None, "none", inputs)


TUNABLE = Tunable("linear_int4", Config, key, default, space, stages, Path(__file__), small)
KERNELS = [Kernel("linear_int4.triton", "cuda", decline, TUNABLE.bind)]
