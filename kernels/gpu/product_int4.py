"""Products of the 4-bit linear layer in the matrix units, whose left operand the weight's nibbles become in registers.

The columns that a thread holds of such an operand are not those of a word.  But a sum may be taken in any order: x is
put into the one in which each thread's share of 32 columns is one word (:func:`ordered`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusegen.kernels.gpu.arrival import arrive
from fusegen.kernels.gpu.quantized import coded, factors, finished, largest

_MAGIC = tl.constexpr(12582912.0)


def _assembly(ones: str, byte: str, kind: str, scaled: bool) -> tl.constexpr:
    """Eight weights of a word $8, two at a time: behind the upper byte of 128 (bfloat16) or 1024 (float16) a code is
    that number more, and exact less that and its zero point, $9.  ``scaled``: times $10 and what that lacks, $11."""
    lines = []
    for i, (half, places) in enumerate((h, p) for h in ("low", "high") for p in ("0x4140", "0x4342")):
        lines += [f"prmt.b32 pair, {half}, {byte}, {places};", f"fma.rn.{kind} pair, pair, one, $9;"]
        if scaled:
            lines += [f"fma.rn.{kind} rest, pair, $11, none;", f"fma.rn.{kind} pair, pair, $10, rest;"]
        lines.append(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, pair;")
    start = f".reg .b32 low, high, pair, rest, one, none; mov.b32 one, {ones}; mov.b32 none, 0x80008000;"
    cut = "and.b32 low, $8, 0x0f0f0f0f; shr.u32 high, $8, 4; and.b32 high, high, 0x0f0f0f0f;"
    return tl.constexpr("\n".join(["{", start, cut, *lines, "}"]))


_CODES = _assembly("0x3f803f80", "0x43", "bf16x2", False)
_BF16, _FP16 = _assembly("0x3f803f80", "0x43", "bf16x2", True), _assembly("0x3c003c00", "0x64", "f16x2", True)
_HALVES = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r")
_SCALED = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r")


@triton.jit
def _nibble(words, zero, PLACE: tl.constexpr):
    """Four bits of words less ``zero``.  They become bits of a float of 2^23, which takes no conversion, and lie where
    they did, which takes no shift."""
    code = ((words & (15 << PLACE)) | 0x4B000000).to(tl.float32, bitcast=True)
    return tl.fma(
        code, tl.full(code.shape, 2.0**-PLACE, tl.float32), -(2.0 ** (23 - PLACE)) - zero + tl.zeros_like(code)
    )


@triton.jit
def _twice(value):
    """A 16-bit float in both halves of an integer."""
    return (value.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001


@triton.jit
def _left(words, zero, scale, kind: tl.constexpr, SCALED: tl.constexpr, NATIVE: tl.constexpr):
    """The operand (rows, 8 W) of ``kind``, in the order of :func:`ordered`, that words (rows, W) stand for, less
    ``zero`` (rows, 1) and, SCALED, times ``scale`` (rows, 1) in float32, rounded once.  NATIVE: two at a time by
    instructions which Triton's interpreter does not know."""
    R: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    if NATIVE and kind != tl.float32:
        if SCALED:
            by = scale.to(kind)
            rest = (scale - by.to(tl.float32)).to(kind)
            if kind == tl.bfloat16:
                given = [words, (zero | 0xC300) * 0x10001, _twice(by), _twice(rest)]
                a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(_BF16, _SCALED, given, (tl.bfloat16,) * 8, True, 1)
            else:
                given = [words, (zero | 0xE400) * 0x10001, _twice(by), _twice(rest)]
                a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(_FP16, _SCALED, given, (tl.float16,) * 8, True, 1)
        else:
            given = [words, (zero | 0xC300) * 0x10001]
            a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(_CODES, _HALVES, given, (tl.bfloat16,) * 8, True, 1)
    else:
        upper, by = words >> 16, zero.to(tl.float32)
        a, b, c, d = _nibble(words, by, 0), _nibble(words, by, 8), _nibble(upper, by, 0), _nibble(upper, by, 8)
        e, f, g, h = _nibble(words, by, 4), _nibble(words, by, 12), _nibble(upper, by, 4), _nibble(upper, by, 12)
    pairs = tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))
    if SCALED and (not NATIVE or kind == tl.float32):
        pairs = pairs * scale[:, :, None, None, None]
    apart = tl.reshape(pairs, (R, W // 4, 4, 2, 2, 2))  # row, 32 columns, word; column in bits 0, 1 and 2
    return tl.reshape(tl.permute(apart, (0, 1, 5, 4, 2, 3)), (R, 8 * W)).to(kind)


@triton.jit
def ordered(tile):
    """Columns of (rows, columns) in the order of the products: of each 32, column 8 t + 4 s + 2 h + b lies at
    16 s + 8 h + 2 t + b."""
    M: tl.constexpr = tile.shape[0]
    K: tl.constexpr = tile.shape[1]
    apart = tl.reshape(tile, (M, K // 32, 4, 2, 2, 2))
    return tl.reshape(tl.permute(apart, (0, 1, 3, 4, 2, 5)), (M, K))


@triton.jit
def order_kernel(
    x, out, scale, rows, width, padded, inner, x_outer, x_inner, x_d, GROUP: tl.constexpr, COUNT: tl.constexpr,
    INT8: tl.constexpr,
):  # fmt: skip
    """COUNT groups of one row of x to out (rows, padded), zero past ``width``, and INT8: as codes with their scales
    (groups, rows).  Compile without fused multiply-add."""
    chunks = padded // GROUP // COUNT + (padded // GROUP % COUNT > 0)
    row = tl.program_id(0) // chunks
    g = tl.program_id(0) % chunks * COUNT + tl.arange(0, COUNT)
    column = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    at = x + (row // inner).to(tl.int64) * x_outer + (row % inner).to(tl.int64) * x_inner
    tile = tl.load(at + column.to(tl.int64) * x_d, mask=column < width, other=0.0)
    if INT8:
        tile, by = _codes(tile)
        tl.store(scale + g.to(tl.int64) * rows + row, by, mask=g < padded // GROUP)
    tl.store(out + row.to(tl.int64) * padded + column, ordered(tile).to(out.dtype.element_ty), mask=column < padded)


@triton.jit
def _codes(tile):
    """Rows of groups as their codes in float32, and the groups' scales."""
    tile = tile.to(tl.float32)
    inverse, finite, by = factors(largest(tile))
    code = coded(tile, inverse[:, None]).to(tl.float32, bitcast=True) - _MAGIC
    return tl.where(finite[:, None], code, 0.0), by


@triton.jit
def product_kernel(
    x, scale_x, weight, scales, zeros, bias, residual, out, sums, arrived,
    rows, n, width, padded, span, inner, x_outer, x_inner, x_d,
    ZEROS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr, INT8: tl.constexpr,
    APART: tl.constexpr, READY: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A (BLOCK_N, BLOCK_M) tile of the output transposed.  Splits of ``span`` steps of K are summed from zero each:
    APART: each by a program, of which the last to come adds them up in their order.  READY: x is what
    :func:`order_kernel` made of it.  A step has COLUMNS of a group; AT_ONCE steps are a turn.  INT8: scales come behind
    the exact product of a group, and SHARE groups make a segment.  16 and 8 are the rows of a panel and the columns of
    a word."""
    TYPE: tl.constexpr = tl.bfloat16 if INT8 else x.dtype.element_ty
    PANELS: tl.constexpr = BLOCK_N // 16
    PER: tl.constexpr = GROUP // COLUMNS
    tiles_m, groups = tl.cdiv(rows, BLOCK_M), padded // GROUP
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) // tiles_m * PANELS
    c, panel, p = first * 16 + tl.arange(0, BLOCK_N), first + tl.arange(0, PANELS), tl.arange(0, 16)
    word, d = tl.arange(0, COLUMNS // 8), tl.arange(0, COLUMNS)
    w_at = weight + tl.cast(first, tl.int64) * (padded * 2)
    near = (tl.arange(0, PANELS) * (padded * 2))[:, None, None] + (word * 16)[None, :, None] + p[None, None, :]
    g_at = (c // 16).to(tl.int64) * (groups * 16) + c % 16
    if READY:
        x_at = x + tl.cast(tl.program_id(0) % tiles_m * BLOCK_M, tl.int64) * padded
        x_near = tl.arange(0, BLOCK_M)[:, None] * padded + d[None, :]
    else:
        x_at = x + ((m // inner).to(tl.int64) * x_outer + (m % inner).to(tl.int64) * x_inner)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    begin = tl.program_id(1) if APART else 0
    for split in range(begin, begin + 1 if APART else SPLITS):
        unit = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        end = tl.minimum(split * span + span, groups * PER)
        later = tl.load(scales + g_at + split * span // PER * 16, mask=c < n, other=0.0)
        for start in range(split * span, end, AT_ONCE):
            for i in tl.static_range(AT_ONCE):
                step, g = start + i, (start + i) // PER
                n_step, m_step = n, rows
                if AT_ONCE > 1:  # the last turn may be short
                    n_step, m_step = tl.where(step < end, n, 0), tl.where(step < end, rows, 0)
                w_at_step = w_at + tl.cast(step, tl.int64) * (COLUMNS * 2)
                words = tl.load(w_at_step + near, mask=(panel * 16 < n_step)[:, None, None], other=0)
                words = tl.reshape(tl.permute(words, (0, 2, 1)), (BLOCK_N, COLUMNS // 8))
                if READY and AT_ONCE == 1:  # rows past the last belong to columns that nobody stores
                    tile = tl.load(x_at + step * COLUMNS + x_near)
                elif READY:
                    tile = tl.load(x_at + step * COLUMNS + x_near, mask=(m < m_step)[:, None], other=0.0)
                else:
                    column = step * COLUMNS + d
                    inside = (m < m_step)[:, None] & (column < width)[None, :]
                    tile = tl.load(x_at + column.to(tl.int64)[None, :] * x_d, mask=inside, other=0.0)
                if INT8:  # wanted behind the product: asked for a step before
                    scale = tl.where(c < n_step, later.to(tl.float32), 0.0)[:, None]
                    later = tl.load(scales + g_at + tl.minimum(step + 1, end - 1) // PER * 16, mask=c < n, other=0.0)
                else:
                    scale = tl.load(scales + g_at + g * 16, mask=c < n_step, other=0.0).to(tl.float32)[:, None]
                zero = tl.full((BLOCK_N,), 8, tl.int32)
                if ZEROS:
                    zero = tl.load(zeros + g_at + g * 16, mask=c < n_step, other=0).to(tl.int32)
                left = _left(words, zero[:, None], scale, TYPE, not INT8, NATIVE)
                if INT8 and not READY:
                    tile, by = _codes(tile)
                if not READY:
                    tile = ordered(tile)
                right = tl.trans(tile.to(TYPE))
                if not INT8:
                    part = tl.dot(left, right, part, input_precision="ieee")
                else:
                    dots = tl.dot(left, right)
                    if READY:  # not sooner: registers are short
                        by = tl.load(scale_x + tl.cast(g, tl.int64) * rows + m, mask=m < m_step, other=0.0)
                    if SHARE == 1:
                        unit += dots * (scale * by[None, :])
                    else:
                        part = tl.fma(dots, scale * by[None, :], part)
                        if (g + 1) % SHARE == 0:
                            unit += part
                            part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        total += unit + part if INT8 else part
    keep, at = (c < n)[:, None] & (m < rows)[None, :], m.to(tl.int64)[None, :] * n + c[:, None]
    if APART:
        own = tl.arange(0, BLOCK_M)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        own += tl.program_id(0).to(tl.int64) * (SPLITS * BLOCK_M * BLOCK_N)
        tl.store(sums + own + begin * (BLOCK_M * BLOCK_N), total, mask=keep)
        if arrive(arrived + tl.program_id(0), SPLITS):
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for s in tl.static_range(SPLITS):
                total += tl.load(sums + own + s * (BLOCK_M * BLOCK_N), mask=keep, other=0.0)
            y = finished(total, bias, residual, at, c[:, None], keep, BIAS, RESIDUAL, ACTIVATION)
            tl.store(out + at, y.to(out.dtype.element_ty), mask=keep)
            tl.store(arrived + tl.program_id(0), 0)
    else:
        y = finished(total, bias, residual, at, c[:, None], keep, BIAS, RESIDUAL, ACTIVATION)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=keep)
