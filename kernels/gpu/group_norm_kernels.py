"""The Triton kernels of group normalization, with or without something joined to x first.

A tensor is seen as (B, C, S) with any strides of C and S.  A slab (one sample's group) that fits a block's registers,
as tiles of a power of two channels, takes one launch.  A larger one takes two, parallel also at batch 1: means and
squared deviations of each channel over each of a few chunks of S; the normalization, each of whose programs first
combines those of the groups it meets (Chan, Golub & LeVeque 1983), in a fixed order, while its first tiles come.
Where whoever made x left its channels' moments, they are combined so and the second launch is the only one.

``JOIN`` is 0, ADDED (x + other, rounded and stored) or CONCAT (the channels of x, ``split`` of them, then other's): the
first launch writes what it joins, the second one reads that.

Programs take steps of DEPTH tiles of (BLOCK_C, BLOCK_S), 8 elements a thread each, all loaded before the first is used.
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
    """The tile of x; where something is joined to it, of that as stored, and the store."""
    at = x + b * x_b + c * x_c + s * x_s
    if JOIN == CONCAT:
        at = tl.where(c < split, at, other + b * o_b + (c - split) * o_c + s * o_s)
    tile = tl.load(at, mask=keep, other=0.0)
    if JOIN == ADDED:
        more = tl.load(other + b * o_b + c * o_c + s * o_s, mask=keep, other=0.0)
        tile = (tile.to(tl.float32) + more.to(tl.float32)).to(joined.dtype.element_ty)
    if JOIN:
        tl.store(joined + b * j_b + c * j_c + s * j_s, tile, mask=keep)
    return tile


@triton.jit
def _step(
    x, other, joined, b, c, first, channels, pixels, x_b, x_c, x_s, o_b, o_c, o_s, j_b, j_c, j_s, split,
    JOIN: tl.constexpr, BLOCK_S: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """DEPTH tiles of the column of channels ``c``, of the pixels from ``first`` on."""
    tiles = ()
    for k in tl.static_range(DEPTH):
        s = first + k * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
        keep = (c < channels) & (s < pixels)
        tiles += (_joined(
            x, other, joined, b, c, s.to(tl.int64), keep, x_b, x_c, x_s, o_b, o_c, o_s, j_b, j_c, j_s, split, JOIN
        ),)  # type: ignore[assignment]  # fmt: skip
    return tiles


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
    add_b, add_c, scale_b, scale_c, shift_b, shift_c, split, groups, pixels, eps,
    JOIN: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, PLUS: tl.constexpr, SCALE: tl.constexpr,
    SHIFT: tl.constexpr, SILU: tl.constexpr, EVEN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    TILES: tl.constexpr, PER_GROUP: tl.constexpr,
):  # fmt: skip
    """One program a slab: (PER_GROUP, pixels) held whole in registers, in TILES of (BLOCK_C, BLOCK_S); EVEN, with
    nothing left over."""
    b, group = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0) % groups
    c, s = tl.arange(0, BLOCK_C)[:, None], tl.arange(0, BLOCK_S)[None, :]
    wide_s = s.to(tl.int64)
    tiles, gains, offsets, sums = (), (), (), tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for k in tl.static_range(TILES):
        keep_c, channel = k * BLOCK_C + c < PER_GROUP, (group * PER_GROUP + k * BLOCK_C + c).to(tl.int64)
        keep = keep_c & (s < pixels)
        tile = _joined(
            x, other, joined, b, channel, wide_s, keep, x_b, x_c, x_s, o_b, o_c, o_s, y_b, y_c, y_s, split, JOIN
        ).to(tl.float32)  # fmt: skip
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
    count = tl.cast(PER_GROUP * pixels, tl.float32)
    mean = tl.sum(sums) / count
    squares = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for k in tl.static_range(TILES):
        away = tiles[k] - mean
        if not EVEN:
            away = tl.where((k * BLOCK_C + c < PER_GROUP) & (s < pixels), away, 0.0)
        squares += away * away
    rstd = 1.0 / tl.sqrt(tl.sum(squares) / count + eps)
    for k in tl.static_range(TILES):
        keep_c, channel = k * BLOCK_C + c < PER_GROUP, (group * PER_GROUP + k * BLOCK_C + c).to(tl.int64)
        out = (tiles[k] - mean) * (rstd * gains[k]) + offsets[k]
        if SILU:
            out = out * sigmoid(out)
        at = y + b * y_b + channel * y_c + wide_s * y_s
        tl.store(at, out.to(y.dtype.element_ty), mask=keep_c & (s < pixels))


@triton.jit
def _added(
    tiles, near, first, pixels, total, squares, EVEN: tl.constexpr, BLOCK_S: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """``total`` and ``squares`` with the deviations from ``near`` of what :func:`_step` gave."""
    for k in tl.static_range(DEPTH):
        away = tiles[k].to(tl.float32) - near[:, None]
        if not EVEN:
            away = tl.where(first + k * BLOCK_S + tl.arange(0, BLOCK_S)[None, :] < pixels, away, 0.0)
        total += away
        squares += away * away
    return total, squares


@triton.jit
def partial_kernel(
    x, other, joined, add, partial, x_b, x_c, x_s, o_b, o_c, o_s, j_b, j_c, j_s, add_b, add_c,
    split, channels, pixels, chunks, steps,
    JOIN: tl.constexpr, PLUS: tl.constexpr, EVEN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over a chunk of ``steps`` -> partial (B, chunks, 2, C).

    Deviations are summed from the first step's mean, which is near enough: the squares of a whole of n steps are at
    most n + 1 times those from the mean of one of them.  EVEN: every chunk is whole."""
    chunk, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    wide_c = c[:, None].to(tl.int64)
    first, covered = chunk * steps * DEPTH * BLOCK_S, tl.minimum(steps * DEPTH * BLOCK_S, pixels)
    tiles = _step(
        x, other, joined, b, wide_c, first, channels, pixels, x_b, x_c, x_s, o_b, o_c, o_s, j_b, j_c, j_s, split,
        JOIN, BLOCK_S, DEPTH,
    )  # fmt: skip
    total = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for k in tl.static_range(DEPTH):
        total += tiles[k].to(tl.float32)
    near = tl.sum(total, axis=1) / tl.cast(tl.minimum(DEPTH * BLOCK_S, pixels - first), tl.float32)
    total, squares = tl.zeros((BLOCK_C, BLOCK_S), tl.float32), tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    total, squares = _added(tiles, near, first, pixels, total, squares, EVEN, BLOCK_S, DEPTH)
    for i in range(1, steps):
        at = first + i * DEPTH * BLOCK_S
        tiles = _step(
            x, other, joined, b, wide_c, at, channels, pixels, x_b, x_c, x_s, o_b, o_c, o_s, j_b, j_c, j_s, split,
            JOIN, BLOCK_S, DEPTH,
        )  # fmt: skip
        total, squares = _added(tiles, near, at, pixels, total, squares, EVEN, BLOCK_S, DEPTH)
    count = tl.cast(tl.minimum(covered, pixels - first), tl.float32)
    off = tl.sum(total, axis=1) / count
    inside, mean = tl.sum(squares, axis=1) - count * off * off, near + off
    inside = tl.where(inside < 0.0, 0.0, inside)  # NaN stays
    if PLUS:
        mean += tl.load(add + b * add_b + c * add_c, mask=c < channels, other=0.0).to(tl.float32)
    out = partial + (b * chunks + chunk) * 2 * channels + c
    tl.store(out, mean, mask=c < channels)
    tl.store(out + channels, inside, mask=c < channels)


@triton.jit
def _part(
    partial, add, b, at, group, add_b, add_c, channels, pixels, chunks, covered,
    MOMENTS: tl.constexpr, PLUS: tl.constexpr, PER_GROUP: tl.constexpr,
):  # fmt: skip
    """(mean, sum of squared deviations, pixels, whether it is one) of the parts ``at`` of each of the ``group``."""
    chunk, channel = at // PER_GROUP, group * PER_GROUP + at % PER_GROUP
    keep = (chunk < chunks) & (channel < channels)
    weight = tl.minimum(covered, pixels - chunk * covered).to(tl.float32)
    one = partial + (b * chunks + chunk) * 2 * channels + channel
    mean = tl.load(one, mask=keep, other=0.0).to(tl.float32)
    inside = tl.load(one + channels, mask=keep, other=0.0).to(tl.float32)
    if MOMENTS:  # variances, of x before anything is added
        inside = inside * weight
        if PLUS:
            mean += tl.load(add + b * add_b + channel * add_c, mask=keep, other=0.0).to(tl.float32)
    return mean, inside, weight, keep


@triton.jit
def _combined(
    partial, add, b, c, add_b, add_c, channels, pixels, chunks, covered, eps,
    MOMENTS: tl.constexpr, PLUS: tl.constexpr, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(mean, reciprocal deviation) of each of the channels ``c``, as columns: those of its group, one of GROUPS."""
    first = tl.program_id(0) * BLOCK_C // PER_GROUP
    group = (first + tl.arange(0, GROUPS))[:, None]
    count = tl.cast(pixels, tl.float32) * PER_GROUP
    total, squares = tl.zeros((GROUPS, WIDTH), tl.float32), tl.zeros((GROUPS, WIDTH), tl.float32)
    for k in tl.static_range(PARTS):
        at = (k * WIDTH + tl.arange(0, WIDTH))[None, :]
        mean, _inside, weight, _keep = _part(
            partial, add, b, at, group, add_b, add_c, channels, pixels, chunks, covered, MOMENTS, PLUS, PER_GROUP
        )
        total += weight * mean
    means = tl.sum(total, axis=1) / count
    for k in tl.static_range(PARTS):
        at = (k * WIDTH + tl.arange(0, WIDTH))[None, :]
        mean, inside, weight, keep = _part(
            partial, add, b, at, group, add_b, add_c, channels, pixels, chunks, covered, MOMENTS, PLUS, PER_GROUP
        )
        away = mean - means[:, None]
        squares += tl.where(keep, inside + weight * away * away, 0.0)
    rstds = 1.0 / tl.sqrt(tl.sum(squares, axis=1) / count + eps)
    own = (c // PER_GROUP - first)[:, None] == tl.arange(0, GROUPS)[None, :]
    mean = tl.sum(tl.where(own, means[None, :], 0.0), axis=1)
    return mean[:, None], tl.sum(tl.where(own, rstds[None, :], 0.0), axis=1)[:, None]


@triton.jit
def _normalized(
    tiles, y, b, c, first, mean, gain, offset, channels, pixels, y_b, y_c, y_s,
    SILU: tl.constexpr, BLOCK_S: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Normalize and store what :func:`_step` gave."""
    for k in tl.static_range(DEPTH):
        s = first + k * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
        out = (tiles[k].to(tl.float32) - mean) * gain + offset
        if SILU:
            out = out * sigmoid(out)
        at = y + b * y_b + c * y_c + s.to(tl.int64) * y_s
        tl.store(at, out.to(y.dtype.element_ty), mask=(c < channels) & (s < pixels))


@triton.jit
def apply_kernel(
    x, other, joined, weight, bias, add, scale, shift, y, partial, x_b, x_c, x_s, o_b, o_c, o_s, j_b, j_c, j_s,
    y_b, y_c, y_s, add_b, add_c, scale_b, scale_c, shift_b, shift_c, split, channels, pixels, chunks, covered, steps,
    eps, JOIN: tl.constexpr, MOMENTS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, PLUS: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr, PER_GROUP: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Normalize ``steps`` by the statistics of each channel's group: ``partial``, of chunks of ``covered`` pixels.

    Backwards: the end of a chunk was read last, and may still be in the cache."""
    b, c = tl.program_id(2).to(tl.int64), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    last = ((tl.program_id(1) + 1) * steps - 1) * DEPTH * BLOCK_S
    column, keep = c[:, None].to(tl.int64), (c < channels)[:, None]
    tiles = _step(
        x, other, joined, b, column, last, channels, pixels, x_b, x_c, x_s, o_b, o_c, o_s, j_b, j_c, j_s, split,
        JOIN, BLOCK_S, DEPTH,
    )  # fmt: skip
    mean, rstd = _combined(
        partial, add, b, c, add_b, add_c, channels, pixels, chunks, covered, eps,
        MOMENTS, PLUS, PER_GROUP, GROUPS, WIDTH, PARTS, BLOCK_C,
    )  # fmt: skip
    if PLUS:
        mean -= tl.load(add + b * add_b + column * add_c, mask=keep, other=0.0).to(tl.float32)
    gain, offset = _affine(
        weight, bias, scale, shift, b, column, keep, scale_b, scale_c, shift_b, shift_c, WEIGHT, BIAS, SCALE, SHIFT
    )
    gain *= rstd
    _normalized(tiles, y, b, column, last, mean, gain, offset, channels, pixels, y_b, y_c, y_s, SILU, BLOCK_S, DEPTH)
    for i in range(1, steps):
        at = last - i * DEPTH * BLOCK_S
        tiles = _step(
            x, other, joined, b, column, at, channels, pixels, x_b, x_c, x_s, o_b, o_c, o_s, j_b, j_c, j_s, split,
            JOIN, BLOCK_S, DEPTH,
        )  # fmt: skip
        _normalized(tiles, y, b, column, at, mean, gain, offset, channels, pixels, y_b, y_c, y_s, SILU, BLOCK_S, DEPTH)
