"""The int8 linear layer on NVIDIA GPUs: rows of x to codes, products of int8 in the matrix units, sums in int32.

One row or two take one launch, without matrix units (:mod:`.few_rows_int8`).  Where the rows of the weight are too few
to fill a GPU, K is split over programs, whose exact sums a third launch adds: integers make the order irrelevant, so a
row's result depends neither on the configuration nor on the other rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu import few_rows_int8
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, meta, power
from fusegen.kernels.gpu.quantized import finished, quantize_stage, scratch, tail, unserved
from fusegen.kernels.gpu.tune import SHARED_BYTES, Tunable
from fusegen.kernels.op import Kernel

WEIGHT, SCALE, BIAS, RESIDUAL = 1, 2, 3, 4  # positions of the tensors in the schema
SMS = 132  # multiprocessors
FILL = 4 * SMS  # programs that keep a GPU's memory busy
# Tiles of many rows (rows of x, of the weight, warps), and how many programs' registers a multiprocessor holds of them.
TILES = {(128, 128, 8): 1, (64, 128, 4): 3, (64, 64, 4): 4, (128, 128, 4): 2}
FEW = 2  # the most rows whose codes every program makes again


@triton.jit
def product_kernel(
    codes, scale_x, weight, scale, bias, residual, out, sums, rows, n, k, padded, share,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A (BLOCK_M, BLOCK_N) tile over ``share`` columns of K: its output or, where SPLIT, its sums (splits, rows, n).
    GROUP tiles of rows go before the next tile of n, so that the weight is read from cache again.  WHOLE: K is whole
    steps.  Rows past the last are the last once more: what guards their loads would cost registers and predicates."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles_n) * GROUP
    high = tl.minimum(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    m = (first + inside % high) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = inside // high * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_K)
    begin = tl.program_id(1) * share
    x_at = codes + tl.minimum(m, rows - 1).to(tl.int64)[:, None] * padded + d[None, :]
    w_at = weight + tl.minimum(c, n - 1).to(tl.int64)[:, None] * k + d[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(begin, tl.minimum(begin + share, k), BLOCK_K):
        if WHOLE:
            x, w = tl.load(x_at + start), tl.load(w_at + start)
        else:
            left = (d < k - start)[None, :]
            x, w = tl.load(x_at + start, mask=left, other=0), tl.load(w_at + start, mask=left, other=0)
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
    keep = (m < rows)[:, None] & (c < n)[None, :]
    at = m.to(tl.int64)[:, None] * n + c[None, :]
    if SPLIT:
        tl.store(sums + tl.program_id(1).to(tl.int64) * rows * n + at, acc, mask=keep)
    else:
        by = (
            tl.load(scale_x + m, mask=m < rows, other=0.0)[:, None] * tl.load(scale + c, mask=c < n, other=0.0)[None, :]
        )
        y = finished(acc.to(tl.float32) * by, bias, residual, at, c[None, :], keep, BIAS, RESIDUAL, ACTIVATION)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=keep)


@triton.jit
def finish_kernel(
    sums, scale_x, scale, bias, residual, out, rows, n,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row of the output from its SPLITS sums."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keep, at = c < n, row * n + c
    total = tl.zeros((BLOCK,), tl.int32)
    for s in tl.static_range(SPLITS):
        total += tl.load(sums + s * tl.cast(rows, tl.int64) * n + at, mask=keep, other=0)
    by = tl.load(scale_x + row) * tl.load(scale + c, mask=keep, other=0.0)
    y = finished(total.to(tl.float32) * by, bias, residual, at, c, keep, BIAS, RESIDUAL, ACTIVATION)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class Config:
    """A tile of ``block_m`` rows of x by ``block_n`` of the weight, ``block_k`` columns a step; K in ``splits``, or 0:
    the kernel of few rows."""

    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


def rows_of(x: Tensor) -> int:
    """The rows of x (*, K)."""
    return math.prod(x.shape[:-1])


def key(x: Tensor, weight: Tensor, *rest: Any) -> str:
    """Rows to the next power of two, and the weight's shape; results are exact integers whatever is chosen."""
    return f"{power(rows_of(x))} {weight.shape[0]}x{weight.shape[1]}"


def _split(n: int, k: int, block_n: int, block_k: int) -> int:
    """Splits of K that fill the GPU for one tile of rows, each of two steps or more."""
    return max(1, min(FILL // max(1, blocks(n, block_n)), k // (2 * block_k)))


def _clocks(rows: int, n: int, k: int, c: Config) -> float:
    """About what a GPU's clock counts until many rows are done, to rank configurations by.  A program waits for its
    products before it asks for more (Triton leaves no sums of int32 in flight), which others beside it hide; a
    multiprocessor has 4096 products a clock, and 40 bytes of the L2 cache where all of them ask."""
    programs = blocks(rows, c.block_m) * blocks(n, c.block_n) * c.splits
    together = max(1, min(blocks(programs, SMS), TILES[c.block_m, c.block_n, c.num_warps]))
    products, moved = c.block_m * c.block_n * c.block_k / 4096, (c.block_m + c.block_n) * c.block_k
    step = max(products + moved / 64 + 200, together * max(products, moved / 40))
    steps = blocks(blocks(k, c.block_k), c.splits)
    added = 4000 + 8 * rows * n * c.splits / (24 * SMS) if c.splits > 1 else 0
    return blocks(programs, SMS * together) * (steps * step + 2500) + added


def _ranked(rows: int, n: int, k: int, limit: int) -> list[Config]:
    """Configurations of many rows, the best by :func:`_clocks` first, with the steps ahead that memory allows."""
    found = []
    for (m, c, warps), block_k, splits in itertools.product(TILES, (128, 256), (1, 2, 3, 4, 6, 8)):
        tiles = blocks(rows, m) * blocks(n, c)
        if splits == 1 and m * c > 64 * 32 * warps:
            continue  # what follows the sums would not fit the registers beside them
        if splits > 1 and (tiles >= SMS or splits > k // (2 * block_k)):
            continue
        together = max(1, min(blocks(tiles * splits, SMS), TILES[m, c, warps]))
        depth = (limit // together - 2048) // ((m + c) * block_k)
        if depth >= 2:
            found.append(Config(m, c, block_k, splits, warps, min(depth, 6)))
    return sorted(found, key=lambda config: _clocks(rows, n, k, config))


def _by_words(weight: Tensor) -> bool:
    """Whether its rows are whole words of four columns and start at such."""
    return weight.shape[1] % 4 == 0 and weight.data_ptr() % 4 == 0


def default(x: Tensor, weight: Tensor, *rest: Any, limit: int = SHARED_BYTES) -> Config:
    """Few rows: tall steps along K, split to fill the GPU; many: what is first by :func:`_clocks`."""
    rows, (n, k) = rows_of(x), weight.shape
    if rows <= FEW and _by_words(weight):
        return Config(power(rows), 16 if k <= 4096 else 8, 4096, 0, 8, 1)
    if rows <= 16 and n >= 128 * 32:  # enough tiles without splits
        return Config(16, 32, 512, 1, 4, 5)
    if rows <= 32:
        return Config(16 if rows <= 16 else 32, 64, 256, _split(n, k, 64, 256), 4, 4 if limit >= SHARED_BYTES else 3)
    return _ranked(rows, n, k, limit)[0]


def space(x: Tensor, weight: Tensor, *rest: Any) -> Iterator[Config]:
    """A few tiles for a few rows, with one to three splits; of many rows the best ranked, and a step less ahead."""
    rows, (n, k) = rows_of(x), weight.shape
    if rows <= 4 and _by_words(weight):
        for block_n, block_k, warps in ((8, 4096, 8), (16, 4096, 8), (8, 4096, 4), (8, 2048, 4), (16, 2048, 4)):
            yield from (Config(m, block_n, block_k, 0, warps, 1) for m in (1, 2, 4) if m <= power(rows) <= 2 * m)
    if rows > 32:
        for c in _ranked(rows, n, k, SHARED_BYTES)[:10]:
            yield c
            if c.num_stages > 2:
                yield replace(c, num_stages=c.num_stages - 1)
    elif rows > FEW:
        height = 16 if rows <= 16 else 32
        for block_n, block_k, depth in ((32, 512, 4), (32, 512, 5), (32, 256, 6), (64, 256, 4)):
            most = _split(n, k, block_n, block_k)
            yield from (Config(height, block_n, block_k, s, 4, depth) for s in {1, max(1, most // 2), most})


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """Codes, products and, where K is split, the sum of the parts."""
    x, weight, _, bias, residual, activation = args
    rows, (n, k) = rows_of(x), weight.shape
    if not outs[0].numel():
        return ()
    common = tail(bias, residual, activation, (BIAS, RESIDUAL)) | {"scale": Use(SCALE), "weight": Use(WEIGHT), "k": k}
    common |= {"out": outs[0], "rows": rows, "n": n, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": False}
    if not config.splits:
        return (few_rows_int8.stage(x, common, config.block_k // 4, options),)
    padded = blocks(max(k, 1), 16) * 16  # rows of codes start on 16 bytes
    codes, scale_x = scratch(x, rows, padded, dtype=torch.int8), scratch(x, rows, 1, dtype=torch.float32)
    share = blocks(blocks(max(k, 1), config.block_k), config.splits) * config.block_k
    splits = blocks(max(k, 1), share)
    sums = scratch(x, splits, rows, n, dtype=torch.int32) if splits > 1 else codes
    values = common | {"codes": codes, "scale_x": scale_x, "sums": sums, "padded": padded, "share": share}
    values |= {"SPLIT": splits > 1, "BLOCK_K": config.block_k, "GROUP": 8, "WHOLE": k % config.block_k == 0}
    tiles = blocks(rows, config.block_m) * blocks(n, config.block_n)
    made = [quantize_stage(x, codes, scale_x, k), Stage(product_kernel, (tiles, splits), values, options)]
    if splits > 1:
        block = min(1024, power(n))
        last = {name: values[name] for name in finish_kernel.arg_names if name in values}
        last |= {"SPLITS": splits, "BLOCK": block}
        options = {"num_warps": 4, "enable_fp_fusion": False}
        made.append(Stage(finish_kernel, (rows, blocks(n, block)), last, options))
    return tuple(made)


def decline(x: Tensor, weight: Tensor, scale: Tensor, bias: Any, residual: Any, activation: str) -> str | None:
    """Rows too long for registers, and arguments that need more than two strides or are not dense."""
    return unserved(x, x.shape[-1], bias, residual, weight=weight, scale=scale)


def small(x: Tensor, weight: Tensor, *rest: Any) -> Iterator[Config]:
    yield Config(16, 16, 32, 3, 4, 2)
    if _by_words(weight):
        yield Config(2, 4, 64, 0, 4, 1)


def specimens() -> Iterator[Named]:
    """One row, few and many in bfloat16; one shape in the other dtypes."""
    for dtype, kind in SHORT.items():
        for m, n, k in (
            ((1, 4096, 4096), (2, 4096, 11008), (16, 4096, 4096), (512, 5120, 1280))
            if kind == "bf16"
            else ((1, 4096, 4096),)
        ):
            weight = meta(n, k, dtype=torch.int8)
            args = (meta(1, m, k, dtype=dtype), weight, meta(n), meta(n, dtype=dtype), None, "none")
            yield f"{kind} {m}x{n}x{k}", lambda args=args: args  # type: ignore[misc]
    x, residual = meta(1, 512, 1280, dtype=torch.bfloat16), meta(1, 512, 5120, dtype=torch.bfloat16)
    fused = (x, meta(5120, 1280, dtype=torch.int8), meta(5120), None, residual, "gelu")
    yield "bf16 512x5120x1280 gelu residual", lambda: fused


TUNABLE = Tunable("linear_int8", Config, key, default, space, stages, Path(__file__), small)
KERNELS = [Kernel("linear_int8.triton", "cuda", decline, TUNABLE.bind)]
