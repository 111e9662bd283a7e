"""What modulated convolution of many pixels lays out first: weights by taps, scaled pixels with channels innermost."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu.launch import Stage, Use, blocks, power


@triton.jit
def largest_of(styles, channels, s_i, BLOCK: tl.constexpr):
    """The largest magnitude of a sample's styles; 1 where all are 0."""
    top = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, channels, BLOCK):
        i = first + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.abs(tl.load(styles + i * s_i, mask=i < channels, other=0.0).to(tl.float32)))
    largest = tl.max(top, axis=0)
    return tl.where(largest > 0.0, largest, 1.0)


@triton.jit
def layout_kernel(
    weight, packed, squares, x, styles, scaled, outputs, channels, padded, height, width, w_o, w_i, w_y, w_x,
    x_b, x_c, x_y, x_x, s_b, s_i, weight_blocks, pixel_blocks, TAPS_X: tl.constexpr, TAPS: tl.constexpr,
    FLAT: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, STYLES: tl.constexpr,
):  # fmt: skip
    """weight (O, I, ky, kx) -> packed (tap, O, padded) in x's dtype, and the sum of squares over the taps (O, padded);
    x (B, I, H, W) -> scaled (B, H, W, padded): times styles over their largest.  FLAT: y W + x is one index."""
    pid = tl.program_id(0)
    if pid < weight_blocks:
        at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside, i = at < outputs * padded, at % padded
        base, keep = weight + at // padded * w_o + i * w_i, inside & (i < channels)
        total = tl.zeros((BLOCK,), tl.float32)
        for tap in tl.static_range(TAPS):
            w = tl.load(base + tap // TAPS_X * w_y + tap % TAPS_X * w_x, mask=keep, other=0.0).to(tl.float32)
            tl.store(packed + tap * outputs * padded + at, w.to(packed.dtype.element_ty), mask=inside)
            total += w * w
        tl.store(squares + at, total, mask=inside)
    else:
        pid -= weight_blocks
        p = (pid % pixel_blocks).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
        rest = pid // pixel_blocks
        b = (rest // tl.cdiv(padded, CHANNELS)).to(tl.int64)
        c = rest % tl.cdiv(padded, CHANNELS) * CHANNELS + tl.arange(0, CHANNELS)
        there = p < height * width
        start = p * x_x if FLAT else p // width * x_y + p % width * x_x
        near = there[:, None] & (c < channels)[None, :]
        v = tl.load(x + b * x_b + start[:, None] + c[None, :].to(tl.int64) * x_c, mask=near, other=0.0)
        s = tl.load(styles + b * s_b + c * s_i, mask=c < channels, other=0.0).to(tl.float32)
        s /= largest_of(styles + b * s_b, channels, s_i, STYLES)
        to = scaled + (b * height * width + p)[:, None] * padded + c[None, :]
        tl.store(to, (v.to(tl.float32) * s[None, :]).to(scaled.dtype.element_ty),
                 mask=there[:, None] & (c < padded)[None, :])  # fmt: skip


@triton.jit
def norms_kernel(
    styles, squares, norms, outputs, channels, padded, s_b, s_i, eps,
    DEMODULATE: tl.constexpr, BLOCK: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """norms (B, O): what the convolution of styles over their largest magnitude is scaled by."""
    b = tl.program_id(1).to(tl.int64)
    o = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    largest = largest_of(styles + b * s_b, channels, s_i, BLOCK)
    norm = tl.zeros((OUTPUTS,), tl.float32) + largest
    if DEMODULATE:
        total = tl.zeros((OUTPUTS,), tl.float32)
        for first in range(0, channels, BLOCK):
            i = first + tl.arange(0, BLOCK)
            s = tl.load(styles + b * s_b + i * s_i, mask=i < channels, other=0.0).to(tl.float32) / largest
            near = o[:, None].to(tl.int64) * padded + i[None, :]
            w = tl.load(squares + near, mask=(o < outputs)[:, None] & (i < channels)[None, :], other=0.0)
            total += tl.sum(w * (s * s)[None, :], axis=1)
        norm = 1.0 / tl.sqrt(total + eps / largest / largest)
    tl.store(norms + b * outputs + o, norm, mask=o < outputs)


def prepared(args: tuple[Any, ...], packed: Tensor, scaled: Tensor, norms: Tensor) -> tuple[Stage, ...]:
    """The launches that lay weights and pixels out, and find the norms."""
    x, weight, styles = args[:3]
    (batch, channels, height, width), (outputs, _, taps_y, taps_x) = x.shape, weight.shape
    padded = scaled.shape[3]
    squares = torch.empty((outputs, padded), dtype=torch.float32, device=x.device)
    shared = {"outputs": outputs, "channels": channels, "padded": padded, "squares": squares, "styles": Use(2)}
    shared |= {"s_b": styles.stride(0), "s_i": styles.stride(1)}
    tile = min(64, power(padded))
    weight_blocks, pixel_blocks = blocks(outputs * padded, 512), blocks(height * width, 64)
    first = {"weight": Use(1), "x": Use(0), "packed": packed, "scaled": scaled, "height": height, "width": width}
    first |= {f"w_{n}": t for n, t in zip("oiyx", weight.stride(), strict=True)}
    first |= {f"x_{n}": t for n, t in zip("bcyx", x.stride(), strict=True)}
    first |= {"weight_blocks": weight_blocks, "pixel_blocks": pixel_blocks, "TAPS_X": taps_x, "TAPS": taps_y * taps_x}
    first |= {"FLAT": height == 1 or x.stride(2) == width * x.stride(3), "BLOCK": 512, "PIXELS": 64, "CHANNELS": tile}
    grid = (weight_blocks + pixel_blocks * batch * blocks(padded, tile),)
    second = {"norms": norms, "eps": args[12], "DEMODULATE": args[5], "BLOCK": 128, "OUTPUTS": 16}
    return (
        Stage(layout_kernel, grid, shared | first | {"STYLES": 512}, {"num_warps": 4}),
        Stage(norms_kernel, (blocks(outputs, 16), batch), shared | second, {"num_warps": 4}),
    )
