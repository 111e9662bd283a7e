"""What the quantized linear layers share on NVIDIA GPUs: x to int8 codes, and what is fused behind the product."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu.launch import Stage, Use, blocks, power
from fusegen.kernels.op import FLOATS
from fusegen.kernels.rows import rows_of

WIDEST = 32768  # the longest group held in the registers of 32 warps
_TINY = tl.constexpr(2.0**-100)
_STEP = tl.constexpr(1 / 127)
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds to the nearest, ties to even
_NONE, _RELU, _GELU, _GELU_TANH, _SILU, _QUICK_GELU = (tl.constexpr(i) for i in range(6))
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "quick_gelu": 5}


@triton.jit
def largest(tile):
    """The bits of the largest magnitudes of float32 groups (..., group): NaN is above infinity, which is the next."""
    return tl.max(tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=len(tile.shape) - 1)


@triton.jit
def factors(top):
    """Of groups by their :func:`largest`: what makes codes of them, whether they are finite, and their scales."""
    absmax = top.to(tl.float32, bitcast=True)
    finite = top < 0x7F800000
    live = finite & (absmax >= _TINY)
    inverse = tl.where(live, tl.div_rn(127.0, tl.where(live, absmax, 1.0)), 0.0)
    return inverse, finite, tl.where(live, absmax * _STEP, tl.where(finite, 0.0, float("nan")))


@triton.jit
def coded(tile, inverse):
    """Codes, in the low bytes of integers.  Those of a group that is not finite are worth nothing.  Compile without
    fused multiply-add: they must not be rounded otherwise."""
    return (tile * inverse + _MAGIC).to(tl.int32, bitcast=True)


@triton.jit
def packed(bits):
    """The low bytes of integers (..., 4) as one integer, the first in its lowest bits."""
    return tl.sum((bits & 255) << (8 * tl.arange(0, 4)), axis=len(bits.shape) - 1)


@triton.jit
def quantize_kernel(
    x, codes, scale, inner, width, group, groups, chunks, x_outer, x_inner, x_d, stored, padded,
    COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """COUNT groups of one row of x to codes (rows, padded), int8 or floats, and scale (rows, groups).  A group's
    ``stored`` codes are zero past ``width``.  Compile without fused multiply-add: codes must not be rounded otherwise.
    """
    row = (tl.program_id(0) // chunks).to(tl.int64)
    g = (tl.program_id(0) % chunks) * COUNT + tl.arange(0, COUNT)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    column = g * group + d
    keep = (g < groups) & (d < group) & (column < width)
    start = (row // inner) * x_outer + (row % inner) * x_inner
    tile = tl.load(x + start + column.to(tl.int64) * x_d, mask=keep, other=0.0).to(tl.float32)
    inverse, finite, value = factors(largest(tile))
    bits = coded(tile, inverse[:, None])
    if codes.dtype.element_ty == tl.int8:
        code = tl.where(finite[:, None], bits, 0).to(tl.int8)
    else:
        code = tl.where(finite[:, None], bits.to(tl.float32, bitcast=True) - _MAGIC, 0.0).to(codes.dtype.element_ty)
    tl.store(codes + row * padded + column, code, mask=(g < groups) & (d < stored))
    tl.store(scale + row * groups + g, value[:, None], mask=g < groups)


@triton.jit
def finished(y, bias, residual, at, column, keep, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr):
    """act(y + bias) + residual; ``at``: where y's elements lie in the output, ``column``: their columns."""
    if BIAS:
        y = y + tl.load(bias + column, mask=keep, other=0.0).to(tl.float32)
    if ACTIVATION == _RELU:
        y = tl.where(y < 0.0, 0.0, y)  # NaN stays
    elif ACTIVATION == _GELU:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == _GELU_TANH:  # (1 + tanh(u)) / 2 = 1 / (1 + e^(-2u))
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    elif ACTIVATION == _SILU:
        y = y / (1.0 + tl.exp(-y))
    elif ACTIVATION == _QUICK_GELU:
        y = y / (1.0 + tl.exp(-1.702 * y))
    if RESIDUAL:
        y = y + tl.load(residual + at, mask=keep, other=0.0).to(tl.float32)
    return y


def quantize_stage(x: Tensor, codes: Tensor, scale: Tensor, group: int) -> Stage:
    """The launch that fills codes (rows, padded) and scale (rows, groups) from x, argument 0."""
    found = rows_of([x])
    assert found is not None
    ((outer_stride, inner_stride),) = found.strides
    groups, padded = scale.shape[1], codes.shape[1]
    stored = padded // groups
    block = power(max(group, stored))
    count = max(1, min(power(groups), 1024 // block))
    chunks = blocks(groups, count)
    values = {
        "x": Use(0), "codes": codes, "scale": scale, "inner": found.inner, "width": x.shape[-1], "group": group,
        "groups": groups, "chunks": chunks, "x_outer": outer_stride, "x_inner": inner_stride, "x_d": x.stride(-1),
        "stored": stored, "padded": padded, "COUNT": count, "BLOCK": block,
    }  # fmt: skip
    warps = max(1, min(32, count * block // 512))
    grid = (found.outer * found.inner * chunks,)
    return Stage(quantize_kernel, grid, values, {"num_warps": warps, "enable_fp_fusion": False})


def tail(bias: Any, residual: Any, activation: str, places: tuple[int, int]) -> dict[str, Any]:
    """The parameters of :func:`finished`; ``places``: of bias and residual among the op's arguments."""
    return {
        "bias": Use(0) if bias is None else Use(places[0]),
        "residual": Use(0) if residual is None else Use(places[1]),
        "BIAS": bias is not None,
        "RESIDUAL": residual is not None,
        "ACTIVATION": ACTIVATIONS[activation],
    }


def unserved(x: Tensor, group: int, bias: Any, residual: Any, **dense: Any) -> str | None:
    """Why x or what is fused cannot be served; ``dense``: tensors by name that must be contiguous."""
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if group > WIDEST:
        return f"a row of {group} does not fit a block's registers (limit {WIDEST})"
    if x.numel() and rows_of([x]) is None:
        return f"the rows of strides {tuple(x.stride()[:-1])} need more than two strides"
    for name, tensor in ({"bias": bias, "residual": residual} | dense).items():
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} is strided"
    return None


def scratch(x: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory beside x."""
    return torch.empty(shape, dtype=dtype, device=x.device)
