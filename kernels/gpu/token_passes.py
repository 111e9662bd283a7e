"""The passes of token kernels over rows, each by programs of BLOCK tokens, the last of a row to come deciding.

``y`` (B, V) of row stride ``row``: what is drawn from; ``cells`` (B, CELLS) int64 and ``reals`` (B, 8) float32: what a
row's passes leave each other; ``masses`` and ``counts`` (B, BINS), ``lanes`` (B, LANES): zero before and after;
``entries`` (B, V) int64: the row's list.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusegen.kernels import sample_token as spec
from fusegen.kernels.gpu.arrival import arrive
from fusegen.kernels.gpu.token_row import (
    ARRIVED,
    BELOW,
    BEST,
    BIN,
    BINS,
    BLOCK,
    CELLS,
    LEFT,
    LIMIT,
    LIST,
    LISTED,
    LOWER,
    MASS,
    MOMENT,
    UNDER,
    UPPER,
    append,
    bin_of,
    clean,
    clear,
    distance,
    find,
    kept,
    listed,
    listed_mass,
    nearest,
    rows_of,
    scale_of,
    share,
    sums_at,
    tally,
    unpack,
    weights,
)

_WHOLE = tl.constexpr(2.0**spec.BITS)
_BLOCK, _BINS, _CELLS = tl.constexpr(BLOCK), tl.constexpr(BINS), tl.constexpr(CELLS)
_LIST = tl.constexpr(LIST)
LARGEST, INVERSE, FARTHEST, CENTRE, AWAY, NORM, ALONE = (tl.constexpr(i) for i in range(7))  # reals


@triton.jit
def opening(cells, temperature, b, TEMPERATURE: tl.constexpr):
    """(the largest y, its lowest id, the temperature's reciprocal, whether the row is greedy)"""
    largest, picked = unpack(tl.load(cells + BEST))
    heat = tl.load(temperature + b) if TEMPERATURE else 1.0
    inverse = tl.div_rn(1.0, tl.where(heat > 0.0, heat, 1.0))
    greedy = (heat <= 0.0) | (heat != heat) | (inverse == float("inf")) | (largest == -float("inf"))
    return largest, picked, tl.where(greedy, 1.0, inverse), greedy


@triton.jit
def asked(top_k, top_p, b, TOP_K: tl.constexpr, TOP_P: tl.constexpr):
    """(k, p, whether either leaves tokens out)"""
    k = tl.load(top_k + b) if TOP_K else tl.cast(0, tl.int64)
    p = tl.load(top_p + b) if TOP_P else tl.cast(1.0, tl.float32)
    return k, p, (k > 0) | (p < 1.0)


@triton.jit
def tokens(y, size):
    """This program's (cleaned values, ids); -inf past the end."""
    i = tl.program_id(0) * _BLOCK + tl.arange(0, _BLOCK)
    return clean(tl.load(y + i, mask=i < size, other=-float("inf")).to(tl.float32)), i


@triton.jit
def bins_kernel(
    y, cells, masses, counts, temperature, top_k, top_p, size, row,
    TEMPERATURE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
):  # fmt: skip
    """The bins in which top-k and top-p end.  Where top-k comes first, top-p's lies between those of its least and
    its largest mass."""
    b = tl.program_id(1).to(tl.int64)
    cells += b * _CELLS
    k, p, cuts = asked(top_k, top_p, b, TOP_K, TOP_P)
    v = tokens(y + b * row, size)[0]
    largest, _, inverse, greedy = opening(cells, temperature, b, TEMPERATURE)
    if cuts & (greedy == 0):
        masses += b * _BINS
        counts += b * _BINS
        d = distance(v, largest, inverse)
        bin, w = bin_of(d, scale_of(inverse)), weights(d)
        tl.atomic_add(masses + bin, w, mask=w > 0, sem="relaxed")
        if TOP_K:
            tally(counts, bin, d < float("inf"))
        if arrive(cells + ARRIVED, tl.num_programs(0)):
            rows = rows_of(masses)
            fewest, lower = tl.sum(rows, axis=0), tl.cast(_BINS, tl.int32)
            most, end, left = fewest, lower, tl.cast(0, tl.int64)
            if TOP_K:
                found, before = find(counts, rows_of(counts), k)
                if (k > 0) & (found < _BINS):
                    fewest, there = sums_at(masses, rows, found)
                    most, end, left, lower = fewest + there, found, k - before, found
                clear(counts)
            upper, below = lower, tl.cast(0, tl.int64)
            if TOP_P:
                if p < 1.0:
                    lower, below = find(masses, rows, share(fewest, p))
                    upper = find(masses, rows, share(most, p))[0]
            clear(masses)
            tl.store(cells + LOWER, lower.to(tl.int64))
            tl.store(cells + UPPER, upper.to(tl.int64))
            tl.store(cells + BELOW, below)
            tl.store(cells + BIN, end.to(tl.int64))
            tl.store(cells + LEFT, left)
            tl.store(cells + UNDER, fewest)
            tl.store(cells + ARRIVED, 0)


@triton.jit
def edges(cells, cuts):
    """(first bin that is listed, last one, the bin in which top-k ends); all before the first are kept: every one where
    nothing cuts."""
    lower, upper, end = tl.load(cells + LOWER), tl.load(cells + UPPER), tl.load(cells + BIN)
    return tl.where(cuts, lower, _BINS).to(tl.int32), upper.to(tl.int32), tl.where(cuts, end, _BINS).to(tl.int32)


@triton.jit
def settle(
    entries, cells, largest, inverse, p, lower, upper, end, TOP_K: tl.constexpr, TOP_P: tl.constexpr
):  # fmt: skip
    """The farthest d that top-k and top-p leave, found among the listed; see :func:`edges`."""
    n, farthest = tl.load(cells + LISTED).to(tl.int32), tl.cast(float("inf"), tl.float32)
    if TOP_K:
        if end < _BINS:
            left = tl.load(cells + LEFT)
            farthest = nearest(entries, n, largest, inverse, 0.0, end, end, left, True)
    if TOP_P:
        if p < 1.0:
            mass = tl.load(cells + UNDER)
            if TOP_K:
                if end < _BINS:
                    mass += listed_mass(entries, n, largest, inverse, farthest, end, end)
            limit = share(mass, p) - tl.load(cells + BELOW)
            farthest = nearest(entries, n, largest, inverse, 0.0, lower, upper, limit, False)
    return farthest


@triton.jit
def least_of(min_p, b, MIN_P: tl.constexpr):
    """The least weight that min-p keeps."""
    p = tl.load(min_p + b) if MIN_P else tl.cast(0.0, tl.float32)
    return tl.where(p > 0.0, (tl.minimum(p, 1.0) * _WHOLE).to(tl.int64), 0)


@triton.jit
def listed_moments(entries, n, largest, inverse, farthest, least):
    """(mass, sum of trunc(w d)) of the listed that are kept."""
    mass, moment = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    for first in range(0, n, _LIST):
        y = listed(entries, first, n, _LIST)[0]
        d = distance(y, largest, inverse)
        w = weights(d)
        w = tl.where(kept(d, w, farthest, least, 0.0, float("inf")), w, 0)
        mass += tl.sum(w, axis=0)
        moment += tl.sum((w.to(tl.float32) * tl.where(d < float("inf"), d, 0.0)).to(tl.int64), axis=0)
    return mass, moment


@triton.jit
def moments_kernel(
    y, cells, reals, entries, temperature, top_k, top_p, min_p, typical_p, size, row,
    TEMPERATURE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
):  # fmt: skip
    """What typical-p needs: how far the kept reach, their entropy, and the mass that p stands for."""
    b = tl.program_id(1).to(tl.int64)
    cells += b * _CELLS
    entries += b * size
    _k, p, cuts = asked(top_k, top_p, b, TOP_K, TOP_P)
    lower, upper, end = edges(cells, cuts)
    least = least_of(min_p, b, MIN_P)
    v, i = tokens(y + b * row, size)
    largest, _, inverse, greedy = opening(cells, temperature, b, TEMPERATURE)
    if greedy == 0:
        d = distance(v, largest, inverse)
        bin, w, there = bin_of(d, scale_of(inverse)), weights(d), d < float("inf")
        if TOP_K or TOP_P:
            append(entries, cells, v, i, there & (((bin >= lower) & (bin <= upper)) | (bin == end)))
        w = tl.where(there & (bin < lower) & (w >= least), w, 0)
        tl.atomic_add(cells + MASS, tl.sum(w, axis=0), sem="relaxed")
        own = tl.sum((w.to(tl.float32) * tl.where(there, d, 0.0)).to(tl.int64), axis=0)
        tl.atomic_add(cells + MOMENT, own, sem="relaxed")
        if arrive(cells + ARRIVED, tl.num_programs(0)):
            farthest = tl.cast(float("inf"), tl.float32)
            mass, moment = tl.load(cells + MASS), tl.load(cells + MOMENT)
            if TOP_K or TOP_P:
                if cuts:
                    farthest = settle(entries, cells, largest, inverse, p, lower, upper, end, TOP_K, TOP_P)
                    n = tl.load(cells + LISTED).to(tl.int32)
                    more = listed_moments(entries, n, largest, inverse, farthest, least)
                    mass, moment = mass + more[0], moment + more[1]
            centre = tl.div_rn(moment.to(tl.float32), mass.to(tl.float32))
            tl.debug_barrier()  # every thread has read the cells
            tl.store(reals + b * 8 + FARTHEST, farthest)
            tl.store(reals + b * 8 + CENTRE, centre)
            tl.store(cells + LIMIT, share(mass, tl.load(typical_p + b)))
            tl.store(cells + MASS, 0)
            tl.store(cells + MOMENT, 0)
            tl.store(cells + LISTED, 0)
            tl.store(cells + ARRIVED, 0)


@triton.jit
def away_kernel(
    y, cells, reals, masses, temperature, min_p, typical_p, size, row, TEMPERATURE: tl.constexpr, MIN_P: tl.constexpr
):  # fmt: skip
    """The bin of distances from the entropy in which typical-p ends."""
    b = tl.program_id(1).to(tl.int64)
    cells += b * _CELLS
    reals += b * 8
    v = tokens(y + b * row, size)[0]
    largest, _, inverse, greedy = opening(cells, temperature, b, TEMPERATURE)
    if (tl.load(typical_p + b) < 1.0) & (greedy == 0):
        least, centre = least_of(min_p, b, MIN_P), tl.load(reals + CENTRE)
        d = distance(v, largest, inverse)
        w = weights(d)
        w = tl.where(kept(d, w, tl.load(reals + FARTHEST), least, 0.0, float("inf")), w, 0)
        masses += b * _BINS
        tl.atomic_add(masses + bin_of(tl.abs(d - centre), scale_of(inverse)), w, mask=w > 0, sem="relaxed")
        if arrive(cells + ARRIVED, tl.num_programs(0)):
            lower, below = find(masses, rows_of(masses), tl.load(cells + LIMIT))
            clear(masses)
            tl.store(cells + LOWER, lower.to(tl.int64))
            tl.store(cells + BELOW, below)
            tl.store(cells + ARRIVED, 0)
