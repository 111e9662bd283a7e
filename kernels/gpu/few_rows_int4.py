"""The 4-bit linear layer of few rows of x, whose codes it multiplies four at a time outside of the matrix units.

A thread has four rows of the weight in one of LANES spans of K, so that 16-byte loads bring it words whose nibbles are
operands as they lie: nothing is exchanged but x's codes and, once, the sums.  All that a program reads at first is
asked for before x is looked at.
"""

# mypy: disable-error-code="assignment, var-annotated"
# Triton's tuples grow in unrolled loops, which a type of Python's does not.
from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from fusegen.kernels.gpu.launch import Stage, blocks, power
from fusegen.kernels.gpu.quantized import coded, factors, finished, largest, packed

LANES = 32  # segments of K whose groups are summed apart
UNIT = 4  # segments whose sums are summed apart
_LANES, _UNIT = tl.constexpr(LANES), tl.constexpr(UNIT)
_BITS = tl.constexpr(0x4B400000)  # those of 1.5 * 2^23: adding an integer below 2^22 to them gives the float's
_MAGIC = tl.constexpr(12582912.0)


@triton.jit
def _dot8(word, low, high, c, NATIVE: tl.constexpr):
    """c + the dot product of a word's nibbles, the low ones of its bytes with low's signed bytes, the high ones with
    high's.  NATIVE: by instructions of four products, which Triton's interpreter does not know."""
    if NATIVE:
        even, odd = word & 0x0F0F0F0F, (word >> 4) & 0x0F0F0F0F
        c = tl.inline_asm_elementwise("dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [even, low, c], tl.int32, True, 1)
        return tl.inline_asm_elementwise("dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [odd, high, c], tl.int32, True, 1)
    else:  # noqa: RET505  (what follows a return is compiled all the same)
        shift = 8 * tl.arange(0, 4)
        word, low, high = tl.expand_dims(word, -1) >> shift, tl.expand_dims(low, -1), tl.expand_dims(high, -1)
        each = (word & 15) * ((low << (24 - shift)) >> 24) + ((word >> 4) & 15) * ((high << (24 - shift)) >> 24)
        return c + tl.sum(each, axis=len(each.shape) - 1)


@triton.jit
def _columns(p, N: tl.constexpr):
    """The N columns of p (R, N), each (R,).  They are cut in registers: one exchange gives a thread all of a row."""
    R: tl.constexpr = p.shape[0]
    if N == 1:
        return (tl.reshape(p, (R,)),)
    elif N == 2:  # noqa: RET505  (what follows a return is compiled all the same)
        return tl.split(p)
    else:
        low, high = tl.split(tl.permute(tl.reshape(p, (R, 2, N // 2)), (0, 2, 1)))
        return _columns(low, N // 2) + _columns(high, N // 2)


@triton.jit
def _words(at, g, end, GROUP: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr):
    """The words of STEP groups from g on, each (LANES, rows); none past ``end``."""
    WORDS: tl.constexpr = GROUP // 8
    found = ()
    for i in tl.static_range(STEP * WORDS):
        here = at + (g * (WORDS * 16))[:, None] + i * 16
        if MASKED:
            found += (tl.load(here, mask=(g + i // WORDS < end)[:, None], other=0),)
        else:
            found += (tl.load(here),)
    return found


@triton.jit
def _codes(
    x, scale_x, row, g, end, width, groups, x_at, x_d,
    GROUP: tl.constexpr, STEP: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """A row's codes of STEP groups from g on, four to an integer, and their scales, each (LANES,).  CODED: x holds such
    integers; else they are made of it."""
    if CODED:
        FOUR: tl.constexpr = GROUP // 4
        at, each = (g * FOUR)[:, None] + tl.arange(0, STEP * FOUR), g[:, None] + tl.arange(0, STEP)
        four = tl.load(x + row * groups * FOUR + at, mask=at < (end * FOUR)[:, None], other=0)
        by = tl.load(scale_x + row * groups + each, mask=each < end[:, None], other=0.0)
    else:
        column = (g * GROUP)[:, None] + tl.arange(0, STEP * GROUP)
        inside = column < tl.minimum(end * GROUP, width)[:, None]
        tile = tl.load(x + x_at + column.to(tl.int64) * x_d, mask=inside, other=0.0).to(tl.float32)
        tile = tl.reshape(tile, (_LANES, STEP, GROUP))
        inverse, _, by = factors(largest(tile))
        four = packed(tl.reshape(coded(tile, inverse[:, :, None]), (_LANES, STEP * GROUP // 4, 4)))
    return _columns(four, STEP * GROUP // 4), _columns(by, STEP)


@triton.jit
def few_kernel(
    x, scale_x, weight, scales, zeros, bias, residual, out,
    rows, n, width, groups, share, inner, x_outer, x_inner, x_d,
    ZEROS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, GROUP: tl.constexpr,
    STEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr,
    CODED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of the output for BLOCK_M rows of x.  Segment t of K has ``share`` groups, taken STEP at a time.
    EVEN: all segments have as many, and they are whole steps.  AHEAD: the next step's words are asked for before this
    one's products.  16 are the rows of a panel, 8 the columns of a word."""
    WORDS: tl.constexpr = GROUP // 8
    t, c = tl.arange(0, _LANES), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    panel, end = tl.minimum(c // 16, (n - 1) // 16).to(tl.int64), tl.minimum(t * share + share, groups)
    g_at, w_at = (panel * groups * 16 + c % 16)[None, :], weight + (panel * groups * (WORDS * 16) + c % 16)[None, :]
    first, parts = tl.program_id(1) * BLOCK_M, ()
    for _ in tl.static_range(BLOCK_M):
        parts += (tl.zeros((_LANES, BLOCK_N), tl.float32),)
    if AHEAD:
        words = _words(w_at, t * share, end, GROUP, STEP, not EVEN)
    for j in range(0, share, STEP):
        g = t * share + j
        if AHEAD:
            later = _words(w_at, g + STEP, end, GROUP, STEP, True)
        else:
            words = _words(w_at, g, end, GROUP, STEP, not EVEN)
        code, by = (), ()
        for m in tl.static_range(BLOCK_M):
            row = tl.minimum(first + m, rows - 1).to(tl.int64)
            x_at = (row // inner) * x_outer + (row % inner) * x_inner
            code_m, by_m = _codes(x, scale_x, row, g, end, width, groups, x_at, x_d, GROUP, STEP, CODED)
            code, by = code + code_m, by + by_m
        for s in tl.static_range(STEP):
            keep, here = (g + s < end)[:, None], g_at + ((g + s) * 16)[:, None]
            scale = tl.load(scales + here, mask=keep, other=0.0).to(tl.float32)
            zero = tl.load(zeros + here, mask=keep, other=0).to(tl.int32) if ZEROS else 8
            acc = ()
            for m in tl.static_range(BLOCK_M):
                total = tl.zeros((_LANES,), tl.int32)
                for i in tl.static_range((m * STEP + s) * WORDS, (m * STEP + s + 1) * WORDS):
                    total = _dot8(tl.full((_LANES,), 0x11111111, tl.int32), code[2 * i], code[2 * i + 1], total, NATIVE)
                acc += (tl.full((_LANES, BLOCK_N), _BITS, tl.int32) - zero * total[:, None],)
            for i in tl.static_range(WORDS):
                more = ()
                for m in tl.static_range(BLOCK_M):
                    low = code[((m * STEP + s) * WORDS + i) * 2][:, None]
                    high = code[((m * STEP + s) * WORDS + i) * 2 + 1][:, None]
                    more += (_dot8(words[s * WORDS + i], low, high, acc[m], NATIVE),)
                acc = more
            new = ()
            for m in tl.static_range(BLOCK_M):
                exact = acc[m].to(tl.float32, bitcast=True) - _MAGIC
                new += (tl.fma(exact, scale * by[m * STEP + s][:, None], parts[m]),)
            parts = new
        if AHEAD:
            words = later
    for m in tl.static_range(BLOCK_M):
        total, each = tl.zeros((BLOCK_N,), tl.float32), _columns(tl.trans(parts[m]), _LANES)
        for u in tl.static_range(_LANES // _UNIT):
            unit = tl.zeros((BLOCK_N,), tl.float32)
            for v in tl.static_range(_UNIT):
                unit += each[u * _UNIT + v]
            total += unit
        keep, at = (c < n) & (first + m + tl.zeros_like(c) < rows), (first + m).to(tl.int64) * n + c
        y = finished(total, bias, residual, at, c, keep, BIAS, RESIDUAL, ACTIVATION)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=keep)


@dataclass(frozen=True)
class Config:
    """``block_n`` rows of the weight by ``block_m`` of x.  In the kernel of few rows ``words`` of a row of the weight
    are a step, and ``fused`` makes x's codes in its own launch; 0 words: the kernel of the matrix units."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    words: int = 0
    fused: bool = False


def default(rows: int, weight: Tensor, scales: Tensor) -> Config:
    """One row has the most bytes asked for at a time, more have their codes in registers instead; of many it costs less
    to make codes once than in every program.  Two panels share them where there are enough to go round."""
    group, panels = weight.shape[1] * 8 // max(1, scales.shape[1]), 2 if weight.shape[0] > 528 else 1
    words = max(group // 8, 8)
    if rows > 4:
        return Config(8, 16, 4, 1, group // 8)
    if rows > 1:
        return Config(2 if group == 128 or rows == 2 else 4, 16 * panels, 4 * panels, 1, words, True)
    steps = blocks(blocks(scales.shape[1], LANES) * group // 8, 16)
    ahead = steps > 1 and words == 8
    return Config(1, 16 * panels, 4 * panels, 2 if ahead else 1, words if ahead else 16, True)


def space(rows: int, weight: Tensor, scales: Tensor) -> Iterator[Config]:
    """One panel or two a program, one row of x to eight, codes made here or before."""
    word, share = weight.shape[1] // max(1, scales.shape[1]), blocks(scales.shape[1], LANES)
    for height, panels, words, depth, fused in itertools.product(
        (1, 2, 4, 8), (1, 2), (4, 8, 16, 32), (1, 2), (True, False)
    ):
        fits = height <= power(rows) <= 4 * height and word <= words <= max(word, 32 // height)
        steps = depth == 1 or (words * depth <= 32 and words < word * share)  # a step ahead takes registers
        if fits and steps and not (fused and rows > 8):
            yield Config(height, 16 * panels, 4 * panels, depth, words, fused)


def stage(values: Mapping[str, Any], scales: Tensor, config: Config) -> Stage:
    """The launch; ``values``: the parameters that the product by matrix units has too."""
    group, groups, share = values["GROUP"], scales.shape[1], values["share"]
    step = config.words * 8 // group
    x = values["x"] if config.fused or not groups else values["x"].view(torch.int32)
    even = groups == LANES * share and share % step == 0
    more = {"x": x, "groups": groups, "STEP": step, "EVEN": even, "AHEAD": config.num_stages > 1}
    more |= {"CODED": not config.fused, "NATIVE": isinstance(few_kernel, JITFunction)}
    grid = (blocks(values["n"], config.block_n), blocks(values["rows"], config.block_m))
    options = {"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": False}
    return Stage(few_kernel, grid, {**values, **more}, options)
