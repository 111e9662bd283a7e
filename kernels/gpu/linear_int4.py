"""The 4-bit linear layer on NVIDIA GPUs: weights are unpacked in registers, on their way into the matrix units.

The weight is the left operand, so that few rows of x still fill a matrix instruction (:mod:`.product_int4`).  K is cut
into segments and, of four each, splits by the weight's shape alone (:func:`plan_k`).  Few rows of x have a program for
each split, the last of which adds their sums in order; many take the splits one after another and add the same sums in
the same order, and have x laid out for the matrix units, or its codes, by a launch before.

Where ``inputs`` is "int8", a group's sum is an exact integer, and these are added up in a segment, segments in a split
and splits in order, each from zero and with one rounding: so a row's bits depend neither on the configuration nor on
other rows, and the fewest rows have a kernel of their own (:mod:`.few_rows_int4`), which no matrix unit would help.
Where it is "float", the weight is rounded once to x's type and a split's sum is the matrix units' own, which no choice
here reorders.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from fusegen.kernels.gpu import few_rows_int4
from fusegen.kernels.gpu.few_rows_int4 import LANES, UNIT, Config
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, meta, power
from fusegen.kernels.gpu.product_int4 import order_kernel, product_kernel
from fusegen.kernels.gpu.quantized import scratch, tail, unserved
from fusegen.kernels.gpu.tune import SHARED_BYTES, Tunable
from fusegen.kernels.linear_int4 import ROWS, WORD, group_of
from fusegen.kernels.op import Kernel
from fusegen.kernels.rows import rows_of

WEIGHT, SCALES, ZEROS, BIAS, RESIDUAL = 1, 2, 4, 5, 6  # positions of the tensors in the schema
FILL = 96  # programs that are enough without splits of K, of 132 multiprocessors
FEW = 2  # rows that are multiplied outside of the matrix units; the most that may be: 2 * FEW


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
    """Few rows: the least tile, and all of a split asked for at once.  Many: the largest tiles that are enough."""
    rows, deep = math.prod(x.shape[:-1]), limit >= SHARED_BYTES
    if rest[-1] == "int8" and rows <= FEW:
        return few_rows_int4.default(rows, weight, scales)
    if x.dtype == torch.float32 and rest[-1] == "float":  # without matrix units, operands lie in registers
        return Config(16, 64, 8, 2)
    if rows <= 32:
        return Config(16 if rows <= 16 else 32, 64, 4, 5 if deep else 4)
    # Three sums at a time, or operands that all lie in registers (sm_80), leave none for the largest.
    tiles = ((128, 128, 8), (64, 128, 8), (64, 64, 4))[(not deep) + (rest[-1] == "int8") :]
    for block_m, block_n, warps in tiles[:2]:
        if rows >= block_m and blocks(rows, block_m) * blocks(weight.shape[0] * ROWS, block_n) >= FILL:
            return Config(block_m, block_n, warps, 4 if deep else 2, 0, False)
    return Config(64, 64, 4, 4 if deep else 3, 0, False)


def space(x: Tensor, weight: Tensor, scales: Tensor, *rest: Any) -> Iterator[Config]:
    """16 to 128 rows of x by 64 or 128 of the weight; few rows of x without matrix units."""
    rows, exact = math.prod(x.shape[:-1]), x.dtype == torch.float32 and rest[-1] == "float"
    if rows <= 2 * FEW and rest[-1] == "int8":
        yield from few_rows_int4.space(rows, weight, scales)
    if rows <= 64:
        heights = [h for h in (16, 32, 64) if h <= 2 * power(rows) or h == 16]
        yield from (
            Config(height, width, 8 if exact else width // 16, depth)
            for height, width, depth in itertools.product(heights[-2:], (64, 128), (3, 5))
            if not exact or (height <= 32 and depth == 3)
        )
    if rows > 16 and not exact:
        tiles = ((32, 64, 4), (64, 64, 4), (64, 128, 8), (128, 64, 8), (128, 128, 8))
        yield from (Config(*tile, depth, 0, False) for tile in tiles for depth in (3, 4))


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """x made ready where that is apart, and products."""
    x, weight, scales, n, zeros, bias, residual, activation, inputs = args
    rows, padded, group = math.prod(x.shape[:-1]), weight.shape[1] * WORD, group_of(weight, scales)
    if not outs[0].numel():
        return ()
    columns, share, splits = plan_k(*args)
    found = rows_of([x])
    assert found is not None
    where = (found.inner, *found.strides[0], x.stride(-1))
    given = dict(zip(("inner", "x_outer", "x_inner", "x_d"), where, strict=True))
    given |= {"x": Use(0), "width": x.shape[-1], "rows": rows, "padded": padded, "GROUP": group}
    given |= {"INT8": inputs == "int8"}
    values = tail(bias, residual, activation, (BIAS, RESIDUAL)) | given | {"out": outs[0], "n": n, "SHARE": share}
    values |= {"weight": Use(WEIGHT), "scales": Use(SCALES), "zeros": Use(SCALES if zeros is None else ZEROS)}
    values["ZEROS"] = zeros is not None
    if config.words:
        return (few_rows_int4.stage(values, scales, config),)
    ready = not config.fused and padded > 0
    made = [_order(x, given)] if ready else []
    values |= {"x": made[0].values["out"], "scale_x": made[0].values["scale"]} if ready else {"scale_x": Use(0)}
    tiles = blocks(rows, config.block_m) * blocks(n, config.block_n)
    apart = splits > 1 and tiles < FILL
    shape = (tiles * splits, config.block_m * config.block_n) if apart else (1, 1)
    values |= {"sums": scratch(x, *shape, dtype=torch.float32), "APART": apart, "READY": ready, "SPLITS": splits}
    values["arrived"] = torch.zeros(tiles if apart else 1, dtype=torch.int32, device=x.device)
    values |= {"span": share * UNIT * group // columns, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    values |= {"COLUMNS": columns, "AT_ONCE": max(1, 128 // group), "NATIVE": isinstance(product_kernel, JITFunction)}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": False}
    return (*made, Stage(product_kernel, (tiles, splits if apart else 1), values, options))


def _order(x: Tensor, given: dict[str, Any]) -> Stage:
    """The launch that makes of x what the matrix units take; ``given``: the parameters that say where x lies."""
    rows, padded, group, int8 = (given[name] for name in ("rows", "padded", "GROUP", "INT8"))
    groups = padded // group
    count = min(power(groups), 2048 // group)
    values = given | {
        "out": scratch(x, blocks(rows, 128) * 128, padded, dtype=torch.bfloat16 if int8 else x.dtype),  # whole tiles
        "scale": scratch(x, groups, rows, dtype=torch.float32) if int8 else Use(0), "COUNT": count,
    }  # fmt: skip
    return Stage(order_kernel, (rows * blocks(groups, count),), values, {"num_warps": 4, "enable_fp_fusion": False})


def decline(
    x: Tensor, weight: Tensor, scales: Tensor, out_features: int, zeros: Any, bias: Any, residual: Any, *rest: Any
) -> str | None:
    """Arguments that need more than two strides or are not dense."""
    return unserved(x, 0, bias, residual, weight=weight, scales=scales, zeros=zeros)


def small(x: Tensor, weight: Tensor, scales: Tensor, *rest: Any) -> Iterator[Config]:
    yield Config(16, 32, 4, 2, 0, False)
    yield Config(16, 16, 4, 2)
    if rest[-1] == "int8":
        yield Config(4, 32, 8, 2, group_of(weight, scales) // WORD)


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
