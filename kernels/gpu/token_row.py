"""What token kernels do with one row of values: weights, masses, thresholds, the draw.

A row is read in tiles of TALL x LANES, so that sums within a lane need no other thread.  Every sum is of integers.
The functions need ``EXACT``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusegen.kernels import sample_token as spec

LANES = spec.LANES
TALL = 4  # rows of LANES in flight
ROWS = 128  # rows of LANES in a tile where one lane's weights are walked
_LANES, _TALL, _ROWS = tl.constexpr(spec.LANES), tl.constexpr(TALL), tl.constexpr(ROWS)
_LARGEST, _FARTHEST, _MAGIC = (tl.constexpr(v) for v in (spec.LARGEST, spec.FARTHEST, spec.MAGIC))
_LOG2E, _HIGH, _LOW = (tl.constexpr(v) for v in (spec.LOG2E, spec.LN2_HIGH, spec.LN2_LOW))
_BITS = tl.constexpr(spec.BITS)
_T7, _T6, _T5, _T4, _T3, _T2, _T1, _T0 = (tl.constexpr(v) for v in spec.TAYLOR)


@triton.jit
def clean(y):
    """NaN becomes -inf, +inf the largest finite number."""
    return tl.where(y != y, -float("inf"), tl.minimum(y, _LARGEST))


@triton.jit
def tile(y, first, size):
    """(cleaned values, ids) of TALL rows of LANES from ``first`` on; -inf where there is nothing."""
    i = first + tl.arange(0, _TALL)[:, None] * _LANES + tl.arange(0, _LANES)[None, :]
    return clean(tl.load(y + i, mask=i < size, other=-float("inf")).to(tl.float32)), i


@triton.jit
def distance(y, largest, inverse):
    """d of the op's text; infinite for -inf, whatever the temperature."""
    gap = largest - y
    return tl.where(gap < float("inf"), gap * inverse, gap)


@triton.jit
def weights(d):
    """trunc(2^BITS e^-d) as int64, by the operations of ``spec.weights``."""
    d = tl.minimum(d, _FARTHEST)
    n = (d * (-_LOG2E) + _MAGIC) - _MAGIC
    r = (n * (-_HIGH) - d) + n * _LOW
    p = tl.zeros_like(d) + _T7
    p = p * r + _T6
    p = p * r + _T5
    p = p * r + _T4
    p = p * r + _T3
    p = p * r + _T2
    p = p * r + _T1
    p = p * r + _T0
    power = ((n.to(tl.int32) + (127 + _BITS)) << 23).to(tl.float32, bitcast=True)
    return (p * power).to(tl.int64)


@triton.jit
def largest_of(y, size):
    """(largest value, its lowest id) of a row."""
    best = tl.full((_TALL, _LANES), -float("inf"), tl.float32)
    where = tl.full((_TALL, _LANES), 0, tl.int32)
    for first in range(0, size, _TALL * _LANES):
        v, i = tile(y, first, size)
        where = tl.where(v > best, i, where)
        best = tl.maximum(v, best)
    largest = tl.max(tl.max(best, axis=0), axis=0)
    ids = tl.where(best == largest, where, 0x7FFFFFFF)
    return largest, tl.min(tl.min(ids, axis=0), axis=0)


@triton.jit
def kept(d, w, farthest, least, centre, away):
    """Whether a token is kept by top-k and top-p (d), min-p (w) and typical-p (its distance from ``centre``)."""
    return (d <= farthest) & (d < float("inf")) & (w >= least) & (tl.abs(d - centre) <= away)


@triton.jit
def masses_of(y, size, largest, inverse, farthest, least, centre, away):
    """The mass kept, lane by lane (LANES,) int64."""
    total = tl.zeros((_LANES,), tl.int64)
    for first in range(0, size, _TALL * _LANES):
        v, _ = tile(y, first, size)
        d = distance(v, largest, inverse)
        w = weights(d)
        total += tl.sum(tl.where(kept(d, w, farthest, least, centre, away), w, 0), axis=0)
    return total


@triton.jit
def boundary(y, size, largest, inverse, farthest, least, centre, limit, high, COUNT: tl.constexpr, AWAY: tl.constexpr):
    """The least key, at most ``high`` (the bits of a float), up to which the weights of the kept reach ``limit``.

    Keys are d, or its distance from ``centre`` where AWAY; weights are masses, or ones where COUNT.
    """
    low, high = tl.cast(0, tl.int32), tl.cast(high, tl.int32)
    while low < high:
        step = (high - low) // 8 + 1
        a = tl.zeros((_LANES,), tl.int64)
        t0, t1, t2, t3, t4, t5, t6 = a, a, a, a, a, a, a
        for first in range(0, size, _TALL * _LANES):
            v, _ = tile(y, first, size)
            d = distance(v, largest, inverse)
            w = weights(d)
            key = tl.abs(d - centre) if AWAY else d
            key = key.to(tl.int32, bitcast=True)
            keep = kept(d, w, farthest, least, 0.0, float("inf"))
            w = tl.where(keep, tl.full((_TALL, _LANES), 1, tl.int64) if COUNT else w, 0)
            key -= low
            t0 += tl.sum(tl.where(key < step, w, 0), axis=0)
            t1 += tl.sum(tl.where(key < 2 * step, w, 0), axis=0)
            t2 += tl.sum(tl.where(key < 3 * step, w, 0), axis=0)
            t3 += tl.sum(tl.where(key < 4 * step, w, 0), axis=0)
            t4 += tl.sum(tl.where(key < 5 * step, w, 0), axis=0)
            t5 += tl.sum(tl.where(key < 6 * step, w, 0), axis=0)
            t6 += tl.sum(tl.where(key < 7 * step, w, 0), axis=0)
        below = tl.where(tl.sum(t0, axis=0) < limit, 1, 0) + tl.where(tl.sum(t1, axis=0) < limit, 1, 0)
        below += tl.where(tl.sum(t2, axis=0) < limit, 1, 0) + tl.where(tl.sum(t3, axis=0) < limit, 1, 0)
        below += tl.where(tl.sum(t4, axis=0) < limit, 1, 0) + tl.where(tl.sum(t5, axis=0) < limit, 1, 0)
        below += tl.where(tl.sum(t6, axis=0) < limit, 1, 0)
        low += below * step
        high = tl.minimum(high, low + step - 1)
    return high.to(tl.float32, bitcast=True)


@triton.jit
def share(mass, p):
    """``spec.share``: the integer mass that p of ``mass`` stands for."""
    units = (tl.maximum(p, 0.0) * 4294967296.0).to(tl.int64).to(tl.uint64)
    whole = mass.to(tl.uint64)  # a product of two words fits 64 bits without a sign
    return tl.maximum(((whole >> 32) * units + (((whole & 0xFFFFFFFF) * units) >> 32)).to(tl.int64), 1)


@triton.jit
def draw(y, size, largest, inverse, farthest, least, centre, away, masses, total, goal):
    """The first token, in the order of ``spec.draw_order``, whose cumulated mass exceeds ``goal``."""
    lanes = tl.cumsum(masses, axis=0)
    lane = tl.sum((lanes <= goal).to(tl.int32), axis=0)
    goal -= tl.sum(tl.where(tl.arange(0, _LANES) < lane, masses, 0), axis=0)
    seen, before = tl.cast(0, tl.int64), tl.cast(0, tl.int32)
    for first in range(0, size, _ROWS * _LANES):
        i = first + lane + tl.arange(0, _ROWS) * _LANES
        d = distance(tl.load(y + i, mask=i < size, other=-float("inf")), largest, inverse)
        w = weights(d)
        w = tl.where(kept(d, w, farthest, least, centre, away), w, 0)
        before += tl.sum((seen + tl.cumsum(w, axis=0) <= goal).to(tl.int32), axis=0)
        seen += tl.sum(w, axis=0)
    return lane + before * _LANES


@triton.jit
def moment_of(y, size, largest, inverse, farthest, least):
    """The sum of trunc(w d) over the kept."""
    total = tl.zeros((_LANES,), tl.int64)
    for first in range(0, size, _TALL * _LANES):
        v, _ = tile(y, first, size)
        d = distance(v, largest, inverse)
        w = weights(d)
        keep = kept(d, w, farthest, least, 0.0, float("inf"))
        total += tl.sum(tl.where(keep, w.to(tl.float32) * tl.where(keep, d, 0.0), 0.0).to(tl.int64), axis=0)
    return tl.sum(total, axis=0)


@triton.jit
def after(y, size, largest, inverse, farthest, least, centre, away, value, last):
    """The kept (value, id) that follows ``value`` of id ``last``, by falling value and rising id; -inf: none."""
    best = tl.full((_TALL, _LANES), -float("inf"), tl.float32)
    where = tl.full((_TALL, _LANES), 0x7FFFFFFF, tl.int32)
    for first in range(0, size, _TALL * _LANES):
        v, i = tile(y, first, size)
        d = distance(v, largest, inverse)
        next = (v < value) | ((v == value) & (i > last))
        better = next & kept(d, weights(d), farthest, least, centre, away) & (v > best)
        where = tl.where(better, i, where)
        best = tl.where(better, v, best)
    value = tl.max(tl.max(best, axis=0), axis=0)
    ids = tl.where(best == value, where, 0x7FFFFFFF)
    return value, tl.min(tl.min(ids, axis=0), axis=0)
