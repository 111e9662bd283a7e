"""The passes of token kernels that end in tokens: the draw, and the likeliest ones.  See :mod:`.token_passes`."""

from __future__ import annotations

import triton
import triton.language as tl

from fusegen.kernels import sample_token as spec
from fusegen.kernels.gpu.arrival import arrive
from fusegen.kernels.gpu.noise_normal import philox
from fusegen.kernels.gpu.token_passes import (
    ALONE,
    AWAY,
    CENTRE,
    FARTHEST,
    INVERSE,
    LARGEST,
    NORM,
    asked,
    edges,
    least_of,
    opening,
    settle,
    tokens,
)
from fusegen.kernels.gpu.token_row import (
    ARRIVED,
    BELOW,
    BEST,
    BINS,
    BLOCK,
    CELLS,
    LANES,
    LEAST,
    LIMIT,
    LIST,
    LISTED,
    LOWER,
    LOWEST,
    MODEL,
    RAW,
    append,
    bin_of,
    clean,
    clear,
    distance,
    draw,
    find,
    kept,
    listed,
    nearest,
    rows_of,
    scale_of,
    tally,
    unpack,
    weights,
)

_TAG, _UNIT = tl.constexpr(spec.TAG), tl.constexpr(2.0**-spec.BITS)
_BLOCK, _BINS, _CELLS, _LANES = tl.constexpr(BLOCK), tl.constexpr(BINS), tl.constexpr(CELLS), tl.constexpr(LANES)
_LOWEST, _LIST = tl.constexpr(LOWEST), tl.constexpr(LIST)


@triton.jit
def random_word(seeds, positions, requests, b, REQUESTS: tl.constexpr):
    """``spec.random_bits`` of row b as an uint64."""
    c0 = tl.zeros((1,), tl.uint32) + tl.load(positions + b).to(tl.uint32)
    who = tl.load(requests + b) if REQUESTS else tl.cast(0, tl.int64)
    c1, c2 = tl.zeros_like(c0) + who.to(tl.uint32), tl.zeros_like(c0) + (who >> 32).to(tl.uint32)
    high, low, _, _ = philox(c0, c1, c2, tl.zeros_like(c0) + _TAG, tl.load(seeds + b))
    return tl.max((high.to(tl.uint64) << 32) | low.to(tl.uint64), axis=0)


@triton.jit
def add_listed(entries, n, lanes, largest, inverse, farthest, least, centre, away, lower):
    """Add the masses of the listed that are kept to the row's lanes, but for those before bin ``lower``."""
    scale = scale_of(inverse)
    for first in range(0, n, _LIST):
        v, i = listed(entries, first, n, _LIST)
        d = distance(v, largest, inverse)
        w = weights(d)
        keep = kept(d, w, farthest, least, centre, away) & (bin_of(tl.abs(d - centre), scale) >= lower)
        tl.atomic_add(lanes + i % _LANES, w, mask=keep & (w > 0), sem="relaxed")


@triton.jit
def pick_kernel(
    y, raw, cells, reals, lanes, entries, temperature, top_k, top_p, min_p, typical_p, seeds, positions, requests,
    token, logprob, size, row, raw_row, REQUESTS: tl.constexpr, TEMPERATURE: tl.constexpr, TOP_K: tl.constexpr,
    TOP_P: tl.constexpr, MIN_P: tl.constexpr, TYPICAL: tl.constexpr, PROBABILITIES: tl.constexpr,
):  # fmt: skip
    """Masses by lanes, then the draw and its log-probability.  PROBABILITIES: 0 of the kept, 1 of softmax(y), 2 of
    softmax(raw).  Leaves the row's state as it was found, and ``reals`` and LEAST to :func:`top_kernel`."""
    b = tl.program_id(1).to(tl.int64)
    y, raw, entries = y + b * row, raw + b * raw_row, entries + b * size
    cells, reals, lanes = cells + b * _CELLS, reals + b * 8, lanes + b * _LANES
    _k, p, cuts = asked(top_k, top_p, b, TOP_K, TOP_P)
    if TYPICAL:
        cuts = tl.load(typical_p + b) < 1.0
    lower, upper, end = edges(cells, cuts)
    least = least_of(min_p, b, MIN_P)
    v, i = tokens(y, size)
    largest, picked, inverse, greedy = opening(cells, temperature, b, TEMPERATURE)
    none, peak = largest == -float("inf"), largest
    if PROBABILITIES:
        given = v
        if PROBABILITIES == 2:
            given = tokens(raw, size)[0]
            peak = unpack(tl.load(cells + RAW))[0]
        d = distance(given, peak, 1.0)
        tl.atomic_add(cells + MODEL, tl.sum(tl.where(d < float("inf"), weights(d), 0), axis=0), sem="relaxed")
    away, centre = tl.cast(float("inf"), tl.float32), tl.cast(0.0, tl.float32)
    farthest = away
    if TYPICAL:
        if greedy == 0:
            farthest, centre = tl.load(reals + FARTHEST), tl.load(reals + CENTRE)
    if greedy == 0:
        d = distance(v, largest, inverse)
        bin, w = bin_of(tl.abs(d - centre), scale_of(inverse)), weights(d)
        keep = kept(d, w, farthest, least, centre, away)
        if TYPICAL:
            append(entries, cells, v, i, keep & (bin == lower))
        elif TOP_K or TOP_P:
            append(entries, cells, v, i, (d < float("inf")) & (((bin >= lower) & (bin <= upper)) | (bin == end)))
        tl.atomic_add(lanes + tl.arange(0, _LANES), w, mask=keep & (w > 0) & (bin < lower), sem="relaxed")
    if arrive(cells + ARRIVED, tl.num_programs(0)):
        norm, reach = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
        if greedy == 0:
            if TYPICAL or TOP_K or TOP_P:
                if cuts:
                    n = tl.load(cells + LISTED).to(tl.int32)
                    if TYPICAL:
                        limit = tl.load(cells + LIMIT) - tl.load(cells + BELOW)
                        away = nearest(entries, n, largest, inverse, centre, lower, lower, limit, False)
                    else:
                        farthest = settle(
                            entries, cells, largest, inverse, p, lower, upper, end, TOP_K, TOP_P
                        )  # fmt: skip
                    add_listed(entries, n, lanes, largest, inverse, farthest, least, centre, away, lower)
                    tl.debug_barrier()
            at = lanes + tl.arange(0, _LANES)
            masses = tl.load(at, cache_modifier=".cg")
            tl.debug_barrier()
            tl.store(at, tl.zeros_like(masses))
            total = tl.sum(masses, axis=0)
            goal = tl.umulhi(random_word(seeds, positions, requests, b, REQUESTS), total.to(tl.uint64)).to(tl.int64)
            picked, reach = draw(y, size, largest, inverse, farthest, least, centre, away, masses, goal)
            norm = tl.log(total.to(tl.float64) * _UNIT).to(tl.float32)
        if PROBABILITIES:
            norm = tl.log(tl.load(cells + MODEL).to(tl.float64) * _UNIT).to(tl.float32)
            reach = peak - clean(tl.load(raw + picked).to(tl.float32))
        tl.debug_barrier()  # every thread has read the cells
        tl.store(token + b, tl.where(none, -1, picked.to(tl.int64)))
        tl.store(logprob + b, tl.where(none, -float("inf"), 0.0 - reach - norm))
        tl.store(reals + LARGEST, peak)
        tl.store(reals + INVERSE, 1.0 if PROBABILITIES else inverse)
        tl.store(reals + FARTHEST, float("inf") if PROBABILITIES else farthest)
        tl.store(reals + CENTRE, 0.0 if PROBABILITIES else centre)
        tl.store(reals + AWAY, float("inf") if PROBABILITIES else away)
        tl.store(reals + NORM, norm)
        tl.store(reals + ALONE, 0.0 if PROBABILITIES else greedy.to(tl.float32))
        tl.store(cells + LEAST, 0 if PROBABILITIES else least)
        tl.store(cells + BEST, _LOWEST)
        tl.store(cells + RAW, _LOWEST)
        tl.store(cells + MODEL, 0)
        tl.store(cells + LISTED, 0)
        tl.store(cells + ARRIVED, 0)


@triton.jit
def keeping(y, cells, reals, size):
    """(values, ids, bins, which are kept) of this program's tokens, by what :func:`pick_kernel` left."""
    v, i = tokens(y, size)
    inverse = tl.load(reals + INVERSE)
    d = distance(v, tl.load(reals + LARGEST), inverse)
    keep = kept(d, weights(d), tl.load(reals + FARTHEST), tl.load(cells + LEAST), tl.load(reals + CENTRE),
                tl.load(reals + AWAY))  # fmt: skip
    return v, i, bin_of(d, scale_of(inverse)), keep


@triton.jit
def top_bins_kernel(y, cells, reals, counts, size, row, top):
    """The bin in which the ``top`` likeliest kept tokens end."""
    b = tl.program_id(1).to(tl.int64)
    cells, counts = cells + b * _CELLS, counts + b * _BINS
    _, _, bin, keep = keeping(y + b * row, cells, reals + b * 8, size)
    tally(counts, bin, keep)
    if arrive(cells + ARRIVED, tl.num_programs(0)):
        tl.store(cells + LOWER, find(counts, rows_of(counts), top)[0].to(tl.int64))
        clear(counts)
        tl.store(cells + ARRIVED, 0)


@triton.jit
def top_kernel(y, cells, reals, entries, ids, logprobs, size, row, top):
    """The ``top`` likeliest kept tokens of a row, one after the other: by value, then by id."""
    b = tl.program_id(1).to(tl.int64)
    cells, reals, entries = cells + b * _CELLS, reals + b * 8, entries + b * size
    v, i, bin, keep = keeping(y + b * row, cells, reals, size)
    append(entries, cells, v, i, keep & (bin <= tl.load(cells + LOWER)))
    if arrive(cells + ARRIVED, tl.num_programs(0)):
        length = tl.load(cells + LISTED).to(tl.int32)
        largest, inverse, norm = tl.load(reals + LARGEST), tl.load(reals + INVERSE), tl.load(reals + NORM)
        alone, before = tl.load(reals + ALONE) != 0.0, tl.cast(2**63 - 1, tl.int64)
        for n in range(top):
            best = tl.full((_LIST,), _LOWEST, tl.int64)
            for first in range(0, length, _LIST):
                at = first + tl.arange(0, _LIST)
                entry = tl.load(entries + at, mask=at < length, other=_LOWEST)
                best = tl.maximum(best, tl.where(entry < before, entry, _LOWEST))
            before = tl.max(best, axis=0)
            value, id = unpack(before)
            found = (before > _LOWEST) & ((n == 0) | (alone == 0))
            tl.store(ids + b * top + n, tl.where(found, id, -1).to(tl.int64))
            tl.store(logprobs + b * top + n, tl.where(found, 0.0 - (largest - value) * inverse - norm, -float("inf")))
        tl.store(cells + LISTED, 0)
        tl.store(cells + ARRIVED, 0)
