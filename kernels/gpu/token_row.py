"""What token kernels do with values of a row: weights, bins, thresholds, the draw.

A row is spread over programs of BLOCK tokens.  A threshold is found in two steps: a histogram of the row over BINS
bins of its keys, to which every program adds, says in which bin it lies; the tokens of that bin are then listed, and
the last program to come narrows a bracket of keys eightfold a pass over the list alone.  Every sum is of integers, and
a list's order is of no account.  The functions need ``EXACT``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusegen.kernels import sample_token as spec

LANES = spec.LANES
BLOCK = LANES  # tokens a program
SIDE = 64
BINS = SIDE * SIDE
CELLS = 16  # int64 words of state a row
LIST = 1024  # entries of a list in flight
FEW = 256  # of them where a bracket is narrowed, whose sums take many registers
LOWEST = -(2**63)
_LANES, _SIDE, _BINS, _LOWEST = tl.constexpr(LANES), tl.constexpr(SIDE), tl.constexpr(BINS), tl.constexpr(LOWEST)
_LIST, _FEW = tl.constexpr(LIST), tl.constexpr(FEW)
_DEEP = tl.constexpr(256)  # tokens of a lane in flight
_LARGEST, _FARTHEST, _MAGIC = (tl.constexpr(v) for v in (spec.LARGEST, spec.FARTHEST, spec.MAGIC))
_LOG2E, _HIGH, _LOW = (tl.constexpr(v) for v in (spec.LOG2E, spec.LN2_HIGH, spec.LN2_LOW))
_BITS = tl.constexpr(spec.BITS)
_T7, _T6, _T5, _T4, _T3, _T2, _T1, _T0 = (tl.constexpr(v) for v in spec.TAYLOR)
_WORD = tl.constexpr(0x7FFFFFFF)
# A row's cells: the first FRESH are left as they were found, LOWEST or zero; a pass leaves the others to the next one.
BEST, RAW, ARRIVED, LISTED, MODEL, MASS, MOMENT = (tl.constexpr(i) for i in range(7))
FRESH = 7
LOWER, UPPER, BELOW, BIN, LEFT, UNDER, LEAST, LIMIT = (tl.constexpr(i) for i in range(FRESH, FRESH + 8))


@triton.jit
def clean(y):
    """NaN becomes -inf, +inf the largest finite number."""
    return tl.where(y != y, -float("inf"), tl.minimum(y, _LARGEST))


@triton.jit
def pack(y, i):
    """(value, id) as an int64 that grows with the value and falls with the id."""
    bits = tl.where(y == 0.0, 0.0, y).to(tl.int32, bitcast=True)  # -0 is 0
    return ((bits ^ ((bits >> 31) & _WORD)).to(tl.int64) << 32) | (i ^ _WORD).to(tl.int64)


@triton.jit
def unpack(entry):
    bits = (entry >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & _WORD)).to(tl.float32, bitcast=True), (entry & _WORD).to(tl.int32) ^ _WORD


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
def kept(d, w, farthest, least, centre, away):
    """Whether a token is kept by top-k and top-p (d), min-p (w) and typical-p (its distance from ``centre``)."""
    return (d <= farthest) & (d < float("inf")) & (w >= least) & (tl.abs(d - centre) <= away)


@triton.jit
def share(mass, p):
    """``spec.share``: the integer mass that p of ``mass`` stands for."""
    units = (tl.maximum(p, 0.0) * 4294967296.0).to(tl.int64).to(tl.uint64)
    whole = mass.to(tl.uint64)  # a product of two words fits 64 bits without a sign
    return tl.maximum(((whole >> 32) * units + (((whole & 0xFFFFFFFF) * units) >> 32)).to(tl.int64), 1)


@triton.jit
def scale_of(inverse):
    """Bins a unit of d: 64 over the power of two below ``inverse``, so that a bin is 1/64 to 1/128 of a unit of y and
    the last one begins 32 to 64 below the largest, whatever the temperature.  A power of two keeps keys' order."""
    exponent = (inverse.to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.minimum(tl.maximum(exponent, -20), 20)
    return ((133 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def bin_of(key, scale):
    return tl.minimum(key * scale, _BINS - 1.0).to(tl.int32)


@triton.jit
def tally(counts, bin, there):
    """Count the tokens that are there.  Most of a cold row's are in the last bin: one addition for all of them."""
    last = bin == _BINS - 1
    tl.atomic_add(counts + bin, 1, mask=there & (last == 0), sem="relaxed")
    tl.atomic_add(counts + _BINS - 1, tl.sum((there & last).to(tl.int32), axis=0), sem="relaxed")


@triton.jit
def rows_of(bins):
    """What the programs of a row have added to a histogram, SIDE bins at a time (SIDE,) int64."""
    at = tl.arange(0, _SIDE)[:, None] * _SIDE + tl.arange(0, _SIDE)[None, :]
    return tl.sum(tl.load(bins + at).to(tl.int64), axis=1)


@triton.jit
def find(bins, rows, limit):
    """(the first bin up to which the histogram sums to ``limit``, the sum before it); a bin past the last one where
    none does.  ``rows``: :func:`rows_of` it."""
    at = tl.arange(0, _SIDE)
    row = tl.sum((tl.cumsum(rows, axis=0) < limit).to(tl.int32), axis=0)
    below = tl.sum(tl.where(at < row, rows, 0), axis=0)
    line = tl.load(bins + tl.minimum(row, _SIDE - 1) * _SIDE + at).to(tl.int64)
    line = tl.where(row < _SIDE, line, 0)
    column = tl.sum((below + tl.cumsum(line, axis=0) < limit).to(tl.int32), axis=0)
    return row * _SIDE + column, below + tl.sum(tl.where(at < column, line, 0), axis=0)


@triton.jit
def sums_at(bins, rows, bin):
    """(the sum before a bin, that of the bin)"""
    at = tl.arange(0, _SIDE)
    line = tl.load(bins + bin // _SIDE * _SIDE + at).to(tl.int64)
    below = tl.sum(tl.where(at < bin // _SIDE, rows, 0), axis=0) + tl.sum(tl.where(at < bin % _SIDE, line, 0), axis=0)
    return below, tl.sum(tl.where(at == bin % _SIDE, line, 0), axis=0)


@triton.jit
def clear(bins):
    """Leave zeros, once every thread has read."""
    tl.debug_barrier()
    at = tl.arange(0, _SIDE)[:, None] * _SIDE + tl.arange(0, _SIDE)[None, :]
    tl.store(bins + at, tl.zeros((_SIDE, _SIDE), bins.dtype.element_ty))


@triton.jit
def append(entries, cells, y, i, wanted):
    """Add the wanted (value, id) to the row's list."""
    n = tl.sum(wanted.to(tl.int32), axis=0)
    if n > 0:
        place = tl.cumsum(wanted.to(tl.int32), axis=0) - 1
        start = tl.atomic_add(cells + LISTED, n.to(tl.int64), sem="relaxed")
        tl.store(entries + start + place, pack(y, i), mask=wanted)


@triton.jit
def listed(entries, first, n, SIZE: tl.constexpr):
    """(values, ids) of SIZE entries; -inf past the end."""
    at = first + tl.arange(0, SIZE)
    y, i = unpack(tl.load(entries + at, mask=at < n, other=0))
    return tl.where(at < n, y, -float("inf")), i


@triton.jit
def nearest(entries, n, largest, inverse, centre, first, last, limit, COUNT: tl.constexpr):
    """The least key of the entries in bins ``first`` to ``last`` up to which their weights reach ``limit``.

    Keys are distances of d from ``centre``; weights are masses, or ones where COUNT.
    """
    low, high, scale = tl.cast(_WORD, tl.int32), tl.cast(0, tl.int32), scale_of(inverse)
    for start in range(0, n, _LIST):
        y = listed(entries, start, n, _LIST)[0]
        d = distance(y, largest, inverse)
        key = tl.abs(d - centre)
        inside = (d < float("inf")) & (bin_of(key, scale) >= first) & (bin_of(key, scale) <= last)
        key = key.to(tl.int32, bitcast=True)
        low = tl.minimum(low, tl.min(tl.where(inside, key, _WORD), axis=0))
        high = tl.maximum(high, tl.max(tl.where(inside, key, 0), axis=0))
    least, most = low, high  # the keys of these bins
    while low < high:
        step = (high - low) // 8 + 1
        a = tl.zeros((_FEW,), tl.int64)
        t0, t1, t2, t3, t4, t5, t6 = a, a, a, a, a, a, a
        for start in range(0, n, _FEW):
            y = listed(entries, start, n, _FEW)[0]
            d = distance(y, largest, inverse)
            w = tl.full((_FEW,), 1, tl.int64) if COUNT else weights(d)
            key = tl.abs(d - centre).to(tl.int32, bitcast=True)
            w = tl.where((d < float("inf")) & (key >= least) & (key <= most), w, 0)
            key -= low
            t0 += tl.where(key < step, w, 0)
            t1 += tl.where(key < 2 * step, w, 0)
            t2 += tl.where(key < 3 * step, w, 0)
            t3 += tl.where(key < 4 * step, w, 0)
            t4 += tl.where(key < 5 * step, w, 0)
            t5 += tl.where(key < 6 * step, w, 0)
            t6 += tl.where(key < 7 * step, w, 0)
        below = tl.where(tl.sum(t0, axis=0) < limit, 1, 0) + tl.where(tl.sum(t1, axis=0) < limit, 1, 0)
        below += tl.where(tl.sum(t2, axis=0) < limit, 1, 0) + tl.where(tl.sum(t3, axis=0) < limit, 1, 0)
        below += tl.where(tl.sum(t4, axis=0) < limit, 1, 0) + tl.where(tl.sum(t5, axis=0) < limit, 1, 0)
        below += tl.where(tl.sum(t6, axis=0) < limit, 1, 0)
        low += below * step
        high = tl.minimum(high, low + step - 1)
    return high.to(tl.float32, bitcast=True)


@triton.jit
def listed_mass(entries, n, largest, inverse, farthest, first, last):
    """The mass of the entries in bins ``first`` to ``last`` that are no farther than ``farthest``."""
    total, scale = tl.cast(0, tl.int64), scale_of(inverse)
    for start in range(0, n, _LIST):
        y = listed(entries, start, n, _LIST)[0]
        d = distance(y, largest, inverse)
        inside = (d <= farthest) & (bin_of(d, scale) >= first) & (bin_of(d, scale) <= last)
        total += tl.sum(tl.where(inside, weights(d), 0), axis=0)
    return total


@triton.jit
def draw(y, size, largest, inverse, farthest, least, centre, away, masses, goal):
    """(the first token, in the order of ``spec.draw_order``, whose cumulated mass exceeds ``goal``, its d)."""
    lane = tl.sum((tl.cumsum(masses, axis=0) <= goal).to(tl.int32), axis=0)
    goal -= tl.sum(tl.where(tl.arange(0, _LANES) < lane, masses, 0), axis=0)
    seen, before, far = tl.cast(0, tl.int64), tl.cast(0, tl.int32), 0.0
    for first in range(0, size, _DEEP * _LANES):
        i = first + lane + tl.arange(0, _DEEP) * _LANES
        d = distance(clean(tl.load(y + i, mask=i < size, other=-float("inf")).to(tl.float32)), largest, inverse)
        w = weights(d)
        w = tl.where(kept(d, w, farthest, least, centre, away), w, 0)
        upto = seen + tl.cumsum(w, axis=0)
        before += tl.sum((upto <= goal).to(tl.int32), axis=0)
        far += tl.sum(tl.where((upto > goal) & (upto - w <= goal), d, 0.0), axis=0)
        seen += tl.sum(w, axis=0)
    return lane + before * _LANES, far
