"""The Triton kernels of group normalization, with or without something joined to x first.

A tensor is seen as (B, C, S) with any strides of C and S.  A slab (one sample's group) that fits a block's registers,
as tiles of a power of two channels, takes one launch.  A larger one takes three, parallel also at batch 1: means and
squared deviations of each channel over each chunk of S; their combination per group (Chan, Golub & LeVeque 1983), in a
fixed order; the normalization.

``JOIN`` is 0, ADDED (x + other, rounded and stored) or CONCAT (the channels of x, ``split`` of them, then other's): the
first launch writes what it joins, the last one reads that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusegen.kernels.gpu.activation import sigmoid

ADDED, CONCAT = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _joined(
    x, other, joined, b, c, s, keep, x_b, x_c, x_s, o_b, o_c, o_s, j_b, j_c, j_s, split, JOIN: tl.constexpr
):  # fmt: skip
    """The tile of x in float32; where something is joined to it, of that as stored, and the store."""
    here = keep & (c < split) if JOIN == CONCAT else keep
    tile = tl.load(x + b * x_b + c * x_c + s * x_s, mask=here, other=0.0)
    if JOIN == ADDED:
        more = tl.load(other + b * o_b + c * o_c + s * o_s, mask=keep, other=0.0)
        tile = (tile.to(tl.float32) + more.to(tl.float32)).to(joined.dtype.element_ty)
    if JOIN == CONCAT:
        more = tl.load(other + b * o_b + (c - split) * o_c + s * o_s, mask=keep & (c >= split), other=0.0)
        tile = tl.where(c < split, tile, more)
    if JOIN:
        tl.store(joined + b * j_b + c * j_c + s * j_s, tile, mask=keep)
    return tile.to(tl.float32)


@triton.jit
def _affine(
    weight, bias, scale, shift, b, channel, keep, scale_b, scale_c, shift_b, shift_c,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """(gain, offset) of each of the column ``channel``: what follows the statistics, put together."""
    gain = tl.full(channel.shape, 1.0, tl.float32)
    offset = tl.zeros(channel.shape, tl.float32)
    if WEIGHT:
        gain = tl.load(weight + channel, mask=keep, other=0.0).to(tl.float32)
    if BIAS:
        offset = tl.load(bias + channel, mask=keep, other=0.0).to(tl.float32)
    if SCALE:
        own = 1.0 + tl.load(scale + b * scale_b + channel * scale_c, mask=keep, other=0.0).to(tl.float32)
        gain, offset = gain * own, offset * own
    if SHIFT:
        offset = offset + tl.load(shift + b * shift_b + channel * shift_c, mask=keep, other=0.0).to(tl.float32)
    return gain, offset


@triton.jit
def slab_kernel(
    x, other, joined, weight, bias, add, scale, shift, y, x_b, x_c, x_s, o_b, o_c, o_s, y_b, y_c, y_s,
    add_b, add_c, scale_b, scale_c, shift_b, shift_c, split, groups, per_group, pixels, eps,
    JOIN: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, PLUS: tl.constexpr, SCALE: tl.constexpr,
    SHIFT: tl.constexpr, SILU: tl.constexpr, EVEN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """One program a slab: (per_group, pixels) held whole in registers, in TILES of (BLOCK_C, BLOCK_S); EVEN, with
    nothing left over."""
    b, group = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0) % groups
    c, s = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, BLOCK_S)[None, :]
    wide_s = s.to(tl.int64)
    tiles, gains, offsets, sums = (), (), (), tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for k in tl.static_range(TILES):
        keep_c, channel = k * BLOCK_C + c < per_group, (group * per_group + k * BLOCK_C + c).to(tl.int64)
        keep = keep_c & (s < pixels)
        tile = _joined(
            x, other, joined, b, channel, wide_s, keep, x_b, x_c, x_s, o_b, o_c, o_s, y_b, y_c, y_s, split, JOIN
        )  # fmt: skip
        if PLUS:
            tile = tile + tl.load(add + b * add_b + channel * add_c, mask=keep_c, other=0.0).to(tl.float32)
            tile = tile if EVEN else tl.where(keep, tile, 0.0)
        gain, offset = _affine(
            weight, bias, scale, shift, b, channel, keep_c, scale_b, scale_c, shift_b, shift_c,
            WEIGHT, BIAS, SCALE, SHIFT,
        )  # fmt: skip
        tiles += (tile,)  # type: ignore[assignment]
        gains += (gain,)  # type: ignore[assignment]
        offsets += (offset,)  # type: ignore[assignment]
        sums += tile
    count = tl.cast(per_group * pixels, tl.float32)
    mean = tl.sum(tl.sum(sums, axis=1), axis=0) / count
    squares = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for k in tl.static_range(TILES):
        away = tiles[k] - mean
        if not EVEN:
            away = tl.where((k * BLOCK_C + c < per_group) & (s < pixels), away, 0.0)
        squares += away * away
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / count + eps)
    for k in tl.static_range(TILES):
        keep_c, channel = k * BLOCK_C + c < per_group, (group * per_group + k * BLOCK_C + c).to(tl.int64)
        out = (tiles[k] - mean) * (rstd * gains[k]) + offsets[k]
        if SILU:
            out = out * sigmoid(out)
        at = y + b * y_b + channel * y_c + wide_s * y_s
        tl.store(at, out.to(y.dtype.element_ty), mask=keep_c & (s < pixels))


@triton.jit
def partial_kernel(
    x, other, joined, add, partial, x_b, x_c, x_s, o_b, o_c, o_s, j_b, j_c, j_s, add_b, add_c,
    split, channels, pixels, chunks,
    JOIN: tl.constexpr, PLUS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over BLOCK_S pixels -> partial (B, chunks, 2, C)."""
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = chunk * BLOCK_S + tl.arange(0, BLOCK_S)
    keep = (c < channels)[:, None] & (s < pixels)[None, :]
    channel, wide_s = c[:, None].to(tl.int64), s[None, :].to(tl.int64)
    tile = _joined(x, other, joined, b, channel, wide_s, keep, x_b, x_c, x_s, o_b, o_c, o_s, j_b, j_c, j_s, split, JOIN)
    mean = tl.sum(tile, axis=1) / tl.cast(tl.minimum(BLOCK_S, pixels - chunk * BLOCK_S), tl.float32)
    centred = tl.where(keep, tile - mean[:, None], 0.0)
    if PLUS:
        mean += tl.load(add + b * add_b + c * add_c, mask=c < channels, other=0.0).to(tl.float32)
    out = partial + (b * chunks + chunk) * 2 * channels + c
    tl.store(out, mean, mask=c < channels)
    tl.store(out + channels, tl.sum(centred * centred, axis=1), mask=c < channels)


@triton.jit
def combine_kernel(
    partial, stats, groups, per_group, pixels, chunks, eps, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The partial statistics of one group -> its mean and reciprocal deviation: stats (B, groups, 2)."""
    b, group = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0) % groups
    channels, count = groups * per_group, tl.cast(per_group, tl.float32) * pixels
    base = partial + b * chunks * 2 * channels + group * per_group
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, chunks * per_group, BLOCK):
        at = first + tl.arange(0, BLOCK)
        chunk, keep = at // per_group, at < chunks * per_group
        weight = tl.minimum(BLOCK_S, pixels - chunk * BLOCK_S).to(tl.float32)
        total += weight * tl.load(base + chunk * 2 * channels + at % per_group, mask=keep, other=0.0)
    mean = tl.sum(total, axis=0) / count
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, chunks * per_group, BLOCK):
        at = first + tl.arange(0, BLOCK)
        chunk, keep = at // per_group, at < chunks * per_group
        weight = tl.minimum(BLOCK_S, pixels - chunk * BLOCK_S).to(tl.float32)
        one = base + chunk * 2 * channels + at % per_group
        away = tl.load(one, mask=keep, other=0.0) - mean
        inside = tl.load(one + channels, mask=keep, other=0.0)
        total += tl.where(keep, inside + weight * away * away, 0.0)
    out = stats + tl.program_id(0) * 2
    tl.store(out, mean)
    tl.store(out + 1, 1.0 / tl.sqrt(tl.sum(total, axis=0) / count + eps))


@triton.jit
def apply_kernel(
    x, weight, bias, add, scale, shift, y, stats, x_b, x_c, x_s, y_b, y_c, y_s,
    add_b, add_c, scale_b, scale_c, shift_b, shift_c, channels, groups, per_group, pixels,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, PLUS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Normalize a (BLOCK_C, BLOCK_S) tile with the statistics of each channel's group."""
    b = tl.program_id(2).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    s = (tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S))[None, :]
    keep_c, keep = c < channels, (c < channels) & (s < pixels)
    stat = stats + (b * groups + c // per_group) * 2
    mean, rstd = tl.load(stat, mask=keep_c, other=0.0), tl.load(stat + 1, mask=keep_c, other=0.0)
    if PLUS:
        mean -= tl.load(add + b * add_b + c * add_c, mask=keep_c, other=0.0).to(tl.float32)
    wide_c, wide_s = c.to(tl.int64), s.to(tl.int64)
    tile = tl.load(x + b * x_b + wide_c * x_c + wide_s * x_s, mask=keep, other=0.0).to(tl.float32)
    gain, offset = _affine(
        weight, bias, scale, shift, b, c, keep_c, scale_b, scale_c, shift_b, shift_c, WEIGHT, BIAS, SCALE, SHIFT
    )
    out = (tile - mean) * (rstd * gain) + offset
    if SILU:
        out = out * sigmoid(out)
    tl.store(y + b * y_b + wide_c * y_c + wide_s * y_s, out.to(y.dtype.element_ty), mask=keep)
