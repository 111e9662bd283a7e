"""What the attention kernels on NVIDIA GPUs share: a block of queries walking over keys, and what its tiles take."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fusegen.kernels.gpu.launch import power

SMALLEST = 16  # tl.dot's least extent
LOG2E = math.log2(math.e)
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def capped(s, scale, softcap):
    """softcap tanh(scale s / softcap), where scale and softcap have log2(e) in them, and so has the result."""
    x = s * (scale / softcap)
    fall = tl.exp2(tl.abs(x) * (-2.0 * _LOG2E))
    bent = (1.0 - fall) / (1.0 + fall) * softcap
    return tl.where(x < 0.0, -bent, bent)


@triton.jit
def load_rows(base, rows, stride, limit, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """A (rows, WIDTH) tile of columns FIRST on; rows beyond ``limit`` and columns beyond DIM are zero."""
    d = FIRST + tl.arange(0, WIDTH)
    at = base + rows[:, None] * stride + d[None, :]
    if FIRST + WIDTH > DIM:
        return tl.load(at, mask=(rows < limit)[:, None] & (d < DIM)[None, :], other=0.0)
    return tl.load(at, mask=(rows < limit)[:, None], other=0.0)


@triton.jit
def walk(
    q0, q1, acc0, acc1, top, total, k, v, mask, rows, begin, sure, end, lengths, scale, k_l, v_l, m_q, m_k, queries,
    softcap, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    CLOSED: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, FOLD: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys [begin, end) in blocks, for the queries at positions ``rows``.  From ``sure`` on some keys may be out of
    bounds, after their query (CAUSAL) or out of its window (where WINDOW > 0).  CLOSED: a row may have met no key yet.
    CAP: the scores are capped.  FOLD: ``scale`` is positive, and nothing but it comes between a product and its
    exponential.  One loop, not one for whole blocks and one for the rest: beside a second pipelined loop the assembler
    runs the matrix units of sm_90 in turn with everything else, and beside one that is not pipelined CUDA 12.8's left
    addresses unset where the first had nothing to do."""
    inner = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        far = tl.cast(start, tl.int64)
        left = lengths - start
        s = tl.dot(q0, tl.trans(load_rows(k + far * k_l, inner, k_l, left, 0, D0, DIM)), input_precision=PRECISION)
        if D1 > 0:
            k1 = load_rows(k + far * k_l, inner, k_l, left, D0, D1, DIM)
            s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
        if not FOLD:
            s = capped(s, scale, softcap) if CAP else s * scale
        if MASK > 0:
            at = mask + rows[:, None].to(tl.int64) * m_q + (far + inner)[None, :] * m_k
            given = tl.load(at, mask=(rows < queries)[:, None] & (inner < left)[None, :], other=0)
            if MASK == 1:
                s = tl.where(given != 0, s, float("-inf"))
            else:  # a finite mask stays finite: the lowest float32 times log2(e) would not
                added = tl.maximum(given.to(tl.float32) * _LOG2E, -3.0e38)
                s = tl.where(given == float("-inf"), float("-inf"), s + added)
        if start >= sure:
            keep = (inner < left)[None, :]
            if CAUSAL:
                keep = keep & (rows[:, None] >= (start + inner)[None, :])
            if WINDOW > 0:
                apart = rows[:, None] - (start + inner)[None, :]
                keep = keep & (apart < WINDOW) & (apart > -WINDOW)
            s = tl.where(keep, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, axis=1) * scale if FOLD else tl.max(s, axis=1))
        # Where a row has met no key yet, its maximum is -inf, and subtracting that from itself would make NaN.
        base = tl.where(new == float("-inf"), 0.0, new) if CLOSED else new
        p, fade = tl.exp2((s * scale if FOLD else s) - base[:, None]), tl.exp2(top - base)
        total = total * fade + tl.sum(p, axis=1)
        v0 = load_rows(v + far * v_l, inner, v_l, left, 0, D0, DIM)
        acc0 = tl.dot(p.to(v0.dtype), v0, acc0 * fade[:, None], input_precision=PRECISION)
        if D1 > 0:
            v1 = load_rows(v + far * v_l, inner, v_l, left, D0, D1, DIM)
            acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * fade[:, None], input_precision=PRECISION)
        top = new
    return acc0, acc1, top, total


def widths(dim: int, split: bool) -> tuple[int, int]:
    """The head dimension as tile widths (D0, D1): two powers of two where that is less than one, else (one, 0)."""
    whole = max(SMALLEST, power(dim))
    head = whole // 2
    tail = max(SMALLEST, power(dim - head))
    return (head, tail) if split and head >= SMALLEST and head + tail < whole else (whole, 0)


def fits(block_m: int, block_n: int, threads: int, wide: int, scalar: bool) -> bool:
    """Whether a tile is likely to fit the registers of its threads.  Without tensor cores (``scalar``) a product holds
    its operands there too; with them, a warp takes 16 rows."""
    if scalar:
        return ((block_m + block_n) * wide + block_m * (wide + block_n)) // threads <= 90
    return block_m * wide // threads <= 128 and block_m * block_n // threads <= 96 and block_m * 2 >= threads
