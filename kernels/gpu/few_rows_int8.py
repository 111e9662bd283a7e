"""The int8 linear layer of the fewest rows of x in one launch: every program makes x's codes again, and multiplies them
four at a time outside of the matrix units.  What it reads of the weight at first is asked for before x is looked at.
"""

# mypy: disable-error-code="assignment, var-annotated"
# Triton's tuples grow in unrolled loops, which a type of Python's does not.
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from fusegen.kernels.gpu.launch import Stage, Use, blocks
from fusegen.kernels.gpu.quantized import coded, factors, finished, packed
from fusegen.kernels.rows import rows_of


@triton.jit
def _row(x, first, k, x_d, BLOCK: tl.constexpr):
    """BLOCK elements of a row from ``first`` on, zero past k."""
    d = first + tl.arange(0, BLOCK)
    return tl.load(x + d.to(tl.int64) * x_d, mask=d < k, other=0.0).to(tl.float32)


@triton.jit
def _dot4(a, b, NATIVE: tl.constexpr):
    """The dot product of four signed bytes each.  NATIVE: by the instruction for it, which Triton's interpreter does
    not know."""
    if NATIVE:
        zero = tl.zeros_like(a)
        return tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, zero], tl.int32, True, 1)
    else:  # noqa: RET505  (what follows a return is compiled all the same)
        shift = 24 - 8 * tl.arange(0, 4)
        each = ((tl.expand_dims(a, -1) << shift) >> 24) * ((tl.expand_dims(b, -1) << shift) >> 24)
        return tl.sum(each, axis=len(each.shape) - 1)


@triton.jit
def few_kernel(
    x, weight, scale, bias, residual, out, rows, n, k, inner, x_outer, x_inner, x_d,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, WHOLE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of the output for BLOCK_M rows of x; BLOCK_W words of four columns of a row of the weight are a
    step, and WHOLE: all of it.  What is read past k meets codes of zero."""
    w, c = tl.arange(0, BLOCK_W), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = weight.to(tl.pointer_type(tl.int32)) + tl.minimum(c, n - 1).to(tl.int64)[:, None] * (k // 4) + w[None, :]
    words = tl.load(at, mask=(w < k // 4)[None, :])
    factor = tl.load(scale + c, mask=c < n, other=0.0)
    x_at, inverse, by, sums = (), (), (), ()
    for m in tl.static_range(BLOCK_M):
        row = tl.minimum(tl.program_id(1) * BLOCK_M + m, rows - 1).to(tl.int64)
        x_at += (x + (row // inner) * x_outer + (row % inner) * x_inner,)
        most = _row(x_at[m], 0, k, x_d, 4 * BLOCK_W).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if not WHOLE:
            for start in range(4 * BLOCK_W, k, 4 * BLOCK_W):
                more = _row(x_at[m], start, k, x_d, 4 * BLOCK_W).to(tl.int32, bitcast=True)
                most = tl.maximum(most, more & 0x7FFFFFFF)
        inverse_m, _, by_m = factors(tl.max(most, axis=0))
        inverse += (inverse_m,)
        by += (by_m,)
        sums += (tl.zeros((BLOCK_N,), tl.int32),)
    for start in range(0, 4 * BLOCK_W if WHOLE else k, 4 * BLOCK_W):
        if not WHOLE:
            later = start // 4 + BLOCK_W
            ahead = tl.load(at + later, mask=(later + w < k // 4)[None, :])
        new = ()
        for m in tl.static_range(BLOCK_M):
            codes = coded(_row(x_at[m], start, k, x_d, 4 * BLOCK_W), inverse[m])
            four = packed(tl.reshape(codes, (BLOCK_W, 4)))[None, :]
            new += (sums[m] + tl.sum(_dot4(words, four, NATIVE), axis=1),)
        sums = new
        if not WHOLE:
            words = ahead
    for m in tl.static_range(BLOCK_M):
        row = tl.program_id(1) * BLOCK_M + m
        keep, to = (c < n) & (row + tl.zeros_like(c) < rows), row.to(tl.int64) * n + c
        y = finished(sums[m].to(tl.float32) * (by[m] * factor), bias, residual, to, c, keep, BIAS, RESIDUAL, ACTIVATION)
        tl.store(out + to, y.to(out.dtype.element_ty), mask=keep)


def stage(x: Tensor, values: Mapping[str, Any], words: int, options: Mapping[str, Any]) -> Stage:
    """The launch for x, argument 0; ``values``: the parameters that the product by matrix units has too."""
    found = rows_of([x])
    assert found is not None
    ((outer, inner),) = found.strides
    own = {"x": Use(0), "inner": found.inner, "x_outer": outer, "x_inner": inner, "x_d": x.stride(-1)}
    own |= {"BLOCK_W": words, "WHOLE": values["k"] <= 4 * words, "NATIVE": isinstance(few_kernel, JITFunction)}
    grid = (blocks(values["n"], values["BLOCK_N"]), blocks(values["rows"], values["BLOCK_M"]))
    return Stage(few_kernel, grid, {**values, **own}, options)
