"""Bias, activation, gain and clamp on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.bias_act import finish, folded
from fusegen.kernels.gpu.activation import activated
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, TritonLaunch, Use, blocks, meta
from fusegen.kernels.op import Kernel, is_channels_last

X, BIAS = 0, 1  # positions of the tensors in the schema
BLOCK = 2048


@triton.jit
def bias_act_kernel(
    x, bias, y, count, channels, inner, x_outer, x_channel, x_inner, alpha, gain, clamp,
    BIAS: tl.constexpr, ACT: tl.constexpr, CLAMP: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of y, which lies dense in (outer, channels, inner); so does x where DENSE."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    keep = at < count
    if DENSE:
        value = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
    else:
        row = at // inner
        where = (row // channels) * x_outer + (row % channels) * x_channel + (at % inner) * x_inner
        value = tl.load(x + where, mask=keep, other=0.0).to(tl.float32)
    if BIAS:
        period = tl.cast(channels, tl.int64) * inner  # one 64-bit remainder a program; those of an element are 32-bit
        near = (start % period).to(tl.int32) + tl.arange(0, BLOCK)
        value += tl.load(bias + near // inner % channels, mask=keep, other=0.0).to(tl.float32)
    value = activated(value, alpha, ACT) * gain
    if CLAMP:
        value = tl.where(value > clamp, clamp, tl.where(value < -clamp, -clamp, value))  # NaN stays
    tl.store(y + at, value.to(y.dtype.element_ty), mask=keep)


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> tuple[Stage, ...]:
    """One launch."""
    x, bias, dim, *rest = args
    if not x.numel():
        return ()
    found, view = finish("bias_act", *rest), folded(x, bias, dim)
    assert view is not None
    _, channels, inner = view.sizes
    values = {
        "x": Use(X),
        "bias": Use(X) if bias is None else Use(BIAS),
        "y": outs[0],
        "count": x.numel(),
        "channels": channels,
        "inner": inner,
        "x_outer": view.strides[0],
        "x_channel": view.strides[1],
        "x_inner": view.strides[2],
        "alpha": found.alpha,
        "gain": found.gain,
        "clamp": found.clamp,
        "BIAS": bias is not None,
        "ACT": found.act,
        "CLAMP": found.clamp != float("inf"),
        "DENSE": x.is_contiguous() or is_channels_last(x),
        "BLOCK": BLOCK,
    }
    return (Stage(bias_act_kernel, (blocks(x.numel(), BLOCK),), values, {"num_warps": 8}),)


def decline(x: Tensor, bias: Tensor | None, dim: int, *rest: Any) -> str | None:
    """Layouts that three strides do not reach; periods of the bias beyond 32 bits."""
    if not x.numel():
        return None
    view = folded(x, bias, dim)
    if view is None:
        return f"x of strides {tuple(x.stride())} is not reached by three strides"
    if view.sizes[1] * view.sizes[2] >= 2**31 - BLOCK:
        return "one sample has 2^31 elements or more"
    return None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> TritonLaunch:
    return TritonLaunch(args, stages(outs, args))


def specimens() -> Iterator[Named]:
    for dtype, kind in SHORT.items():
        for act in ("lrelu", "tanh"):
            args = (meta(4, 64, 512, 512, dtype=dtype), meta(64, dtype=dtype), 1, act, None, None, 256.0)
            yield f"{kind} {act}", lambda args=args: args  # type: ignore[misc]
    last = torch.empty((4, 64, 256, 256), dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    yield "bf16 softplus channels-last", lambda: (last, meta(64, dtype=torch.bfloat16), 1, "softplus", None, None, None)


KERNELS = [Kernel("bias_act.triton", "cuda", decline, bind)]
