"""Modulated convolution of few pixels: a product of weights as they lie, each read once, by the pixels they meet.

A row of the weights is contiguous over (channel, tap), so programs of BLOCK_O outputs split those among them, gather
what the pixels of a part meet, and leave partial sums.  The last one of an output block to come adds them in their
order, with the norms that were found on the way, and ends the layer.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu.activation import activated
from fusegen.kernels.gpu.arrival import arrive
from fusegen.kernels.gpu.launch import Stage, blocks, power
from fusegen.kernels.modulated_conv2d import sizes

MOST = 256  # output pixels of a sample
REACH = 2**31  # elements; offsets within a sample are int32


@triton.jit
def few_kernel(
    x, weight, styles, noise, bias, out, partial, squares, arrived, channels, outputs, height, width, out_y, out_x,
    pad_y, pad_x, x_b, x_c, x_y, x_x, y_b, y_c, y_y, y_x, n_b, n_y, n_x, s_b, s_i, w_o, blocks_o, alpha, gain, clamp,
    eps, TAPS_X: tl.constexpr, TAPS: tl.constexpr, UP: tl.constexpr, DEMODULATE: tl.constexpr, NOISE: tl.constexpr,
    BIAS: tl.constexpr, ACT: tl.constexpr, CLAMP: tl.constexpr, PIXELS: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_I: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the sums of BLOCK_O outputs by PIXELS pixels of one sample."""
    b, split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    o = tl.program_id(0) % blocks_o * BLOCK_O + tl.arange(0, BLOCK_O)
    p = tl.program_id(0) // blocks_o * PIXELS + tl.arange(0, PIXELS)
    q_y, q_x = p // out_x, p % out_x
    i = tl.arange(0, BLOCK_I)
    largest = tl.max(tl.abs(tl.load(styles + b * s_b + i * s_i, mask=i < channels, other=0.0).to(tl.float32)), axis=0)
    largest = tl.where(largest > 0.0, largest, 1.0)
    x += b * x_b
    acc = tl.zeros((BLOCK_O, PIXELS), tl.float32)
    total = tl.zeros((BLOCK_O,), tl.float32)
    rows = channels * TAPS
    part = tl.cdiv(tl.cdiv(rows, BLOCK_K), SPLITS)
    for n in range(part):
        k = (split * part + n) * BLOCK_K + tl.arange(0, BLOCK_K)
        c, tap = k // TAPS, k % TAPS
        y, z = tap // TAPS_X, tap % TAPS_X
        near = (o < outputs)[:, None] & (k < rows)[None, :]
        w = tl.load(weight + o[:, None] * w_o + k[None, :], mask=near, other=0.0)
        s = tl.load(styles + b * s_b + c * s_i, mask=k < rows, other=0.0).to(tl.float32) / largest
        if UP == 1:
            y, z = q_y[None, :] - pad_y + y[:, None], q_x[None, :] - pad_x + z[:, None]
            met = (y >= 0) & (z >= 0)
        else:  # output q meets tap t at input (q + pad - t) / UP, where that is whole
            y, z = q_y[None, :] + pad_y - y[:, None], q_x[None, :] + pad_x - z[:, None]
            met = (y >= 0) & (z >= 0) & (y % UP == 0) & (z % UP == 0)
            y, z = y // UP, z // UP
        met &= (y < height) & (z < width) & (k < rows)[:, None]
        tile = tl.load(x + (c * x_c)[:, None] + (y * x_y + z * x_x), mask=met, other=0.0)
        tile = (tile.to(tl.float32) * s[:, None]).to(x.dtype.element_ty)
        acc = tl.dot(w.to(x.dtype.element_ty), tile, acc, input_precision=PRECISION)
        if DEMODULATE:
            scaled = w.to(tl.float32) * s[None, :]
            total += tl.sum(scaled * scaled, axis=1)
    group = b * tl.num_programs(0) + tl.program_id(0)
    at = tl.arange(0, BLOCK_O)[:, None] * PIXELS + tl.arange(0, PIXELS)[None, :]
    tl.store(partial + (group * SPLITS + split) * BLOCK_O * PIXELS + at, acc)
    tl.store(squares + (group * SPLITS + split) * BLOCK_O + tl.arange(0, BLOCK_O), total)
    if arrive(arrived + group, SPLITS):
        acc = tl.zeros((BLOCK_O, PIXELS), tl.float32)
        total = tl.zeros((BLOCK_O,), tl.float32)
        for other in tl.static_range(SPLITS):
            acc += tl.load(partial + (group * SPLITS + other) * BLOCK_O * PIXELS + at)
            total += tl.load(squares + (group * SPLITS + other) * BLOCK_O + tl.arange(0, BLOCK_O))
        norm = tl.zeros((BLOCK_O,), tl.float32) + largest
        if DEMODULATE:
            norm = 1.0 / tl.sqrt(total + eps / largest / largest)
        acc *= norm[:, None]
        keep = p < out_y * out_x
        if NOISE:
            acc += tl.load(noise + b * n_b + q_y * n_y + q_x * n_x, mask=keep, other=0.0).to(tl.float32)[None, :]
        if BIAS:
            acc += tl.load(bias + o, mask=o < outputs, other=0.0).to(tl.float32)[:, None]
        acc = activated(acc, alpha, ACT) * gain
        if CLAMP:
            acc = tl.where(acc > clamp, clamp, tl.where(acc < -clamp, -clamp, acc))  # NaN stays
        to = out + b * y_b + o[:, None].to(tl.int64) * y_c + (q_y * y_y + q_x * y_x)[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=keep[None, :] & (o < outputs)[:, None])
        tl.store(arrived + group, 0)


def serves(x: Tensor, weight: Tensor, styles: Tensor, *rest: Any) -> bool:
    """Whether there are so few pixels, and weights whose rows are contiguous."""
    s = sizes(x, weight, styles, *rest)
    reach = [sum((n - 1) * t for n, t in zip(t.shape, t.stride(), strict=True)) for t in (x[:1], weight) if t.numel()]
    rows = weight.shape[0] > 0 and weight[0].is_contiguous()
    return s.out_y * s.out_x <= MOST and rows and max(reach, default=0) < REACH


def splits(x: Tensor, weight: Tensor, pixels: int, outputs: int, block: int, *rest: Any) -> int:
    """Parts that make about 320 programs of one sample, at most 16, each of as many blocks as the longest."""
    s = sizes(x, weight, *rest)
    groups = blocks(s.outputs, outputs) * blocks(s.out_y * s.out_x, pixels)
    total = blocks(s.channels * s.taps_y * s.taps_x, block)
    return blocks(total, blocks(total, max(1, min(16, 320 // groups))))


def stage(values: dict[str, Any], args: tuple[Any, ...], config: Any) -> Stage:
    """The launch; ``values``: those that it shares with the kernel of many pixels."""
    x, weight, styles = args[:3]
    s = sizes(*args[:8])
    blocks_o, tiles = blocks(s.outputs, config.outputs), blocks(s.out_y * s.out_x, config.pixels)
    parts = s.batch * blocks_o * tiles * config.splits
    make = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)  # noqa: E731
    values = values | {
        "partial": make(parts, config.outputs, config.pixels), "squares": make(parts, config.outputs),
        "arrived": torch.zeros(s.batch * blocks_o * tiles, dtype=torch.int32, device=x.device),
        "s_b": styles.stride(0), "s_i": styles.stride(1), "w_o": weight.stride(0), "blocks_o": blocks_o,
        "eps": args[12], "TAPS": s.taps_y * s.taps_x, "DEMODULATE": args[5], "PIXELS": config.pixels,
        "BLOCK_K": config.channels, "BLOCK_I": power(s.channels), "SPLITS": config.splits,
    }  # fmt: skip
    values = {name: values[name] for name in few_kernel.arg_names}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Stage(few_kernel, (blocks_o * tiles, config.splits, s.batch), values, options)
