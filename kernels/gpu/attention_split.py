"""Attention of few queries over many keys on NVIDIA GPUs: a program for each piece of the keys, in one launch
(Flash-Decoding, 2023).

The queries that share a key head are taken together, so that it is read once.  Where the pieces of a sequence lie, and
the order in which the last program to come joins them, depends on the sequence's own length alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu.arrival import arrive
from fusegen.kernels.gpu.attention_tile import LOG2E, SMALLEST, capped, fits
from fusegen.kernels.gpu.launch import Stage, Use, blocks, power, unit
from fusegen.kernels.kv_cache import cache_view, capacity

SLOTS = 64  # the most pieces of a sequence: what one program can join in little time
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def split_kernel(
    q, k, v, lengths, table, sinks, out, values, tops, arrived, scale, softcap,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l, t_b, kv_heads, n, rows, most, block, slots, tiles,
    UNIT: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, LENGTHS: tl.constexpr, PAGED: tl.constexpr,
    SINKS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, PIECE: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M of the ``rows`` queries over one key head, over one piece of the keys.  Row r is query r % n of head
    r // n of those that share it.  A piece is PIECE keys, or as many times that as leaves SLOTS pieces at the most.
    Leaves weighted values (B, Hkv, rows, slots, DIM), and their maximum and sum, for the last piece's program."""
    slot, group = tl.program_id(0) % slots, tl.program_id(0) // slots
    tile, pair = group % tiles, group // tiles
    b, h = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    length = tl.maximum(tl.minimum(tl.load(lengths + b).to(tl.int32), most), 0) if LENGTHS else tl.cast(most, tl.int32)
    first = tl.maximum(length - n - WINDOW + 1, 0) // PIECE * PIECE if WINDOW > 0 else 0
    piece = PIECE * tl.maximum(tl.cdiv(tl.cdiv(length - first, PIECE), SLOTS), 1)
    count = tl.maximum(tl.cdiv(length - first, piece), 1)  # one without keys leaves zeros
    if slot >= count:
        return
    begin, share = first + slot * piece, rows // n
    row, d, inner = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, WIDE), tl.arange(0, BLOCK_N)
    at = q + (b * q_b + (h * share + row // n) * q_h + (row % n) * q_l)[:, None] * UNIT + d[None, :]
    queries = tl.load(at, mask=(row < rows)[:, None] & (d < DIM)[None, :], other=0.0)
    acc = tl.zeros((BLOCK_M, WIDE), tl.float32)
    top, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    place = length - n + row % n
    k += h * k_h * UNIT
    v += h * v_h * UNIT
    for start in tl.range(begin, tl.minimum(begin + piece, length), BLOCK_N):
        key = start + inner
        if PAGED:
            where = tl.load(table + b * t_b + key // block, mask=key < length, other=0).to(tl.int64)
            inside = key % block
        else:
            where, inside = b, key
        keep = (key < length)[:, None] & (d < DIM)[None, :]
        keys = tl.load(k + (where * k_b + inside.to(tl.int64) * k_l)[:, None] * UNIT + d[None, :], mask=keep, other=0.0)
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        s = capped(s, scale, softcap) if CAP else s * scale
        open_to = key[None, :] <= place[:, None] if CAUSAL else (key < length)[None, :]
        if WINDOW > 0:
            open_to = open_to & (key[None, :] > place[:, None] - WINDOW)
        s = tl.where(open_to, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)  # nothing met yet: -inf from itself would make NaN
        p, fade = tl.exp2(s - base[:, None]), tl.exp2(top - base)
        total = total * fade + tl.sum(p, axis=1)
        given = tl.load(
            v + (where * v_b + inside.to(tl.int64) * v_l)[:, None] * UNIT + d[None, :], mask=keep, other=0.0
        )
        acc = tl.dot(p.to(given.dtype), given, acc * fade[:, None], input_precision=PRECISION)
        top = new
    to = (pair.to(tl.int64) * rows + row) * slots + slot
    tl.store(values + to[:, None] * DIM + d[None, :], acc, mask=(row < rows)[:, None] & (d < DIM)[None, :])
    tl.store(tops + to * 2, top, mask=row < rows)
    tl.store(tops + to * 2 + 1, total, mask=row < rows)
    if arrive(arrived + group, count):
        for low in tl.range(tile * BLOCK_M, tl.minimum(rows, (tile + 1) * BLOCK_M), ROWS):
            mine = low + tl.arange(0, ROWS)
            head, there = h * share + mine // n, mine < rows
            past = (pair.to(tl.int64) * rows + low) * slots
            joined = _joined(
                values + past * DIM, tops + past * 2, sinks + head, there, count, slots, DIM, WIDE, SINKS, ROWS, CHUNK
            )
            goal = out + (b * o_b + head * o_h + (mine % n) * o_l)[:, None] + d[None, :]
            tl.store(goal, joined.to(out.dtype.element_ty), mask=there[:, None] & (d < DIM)[None, :])
        tl.store(arrived + group, 0)


@triton.jit
def _joined(
    values, tops, sinks, keep, count, slots, DIM: tl.constexpr, WIDE: tl.constexpr, SINKS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The pieces of ROWS queries put together in order, CHUNK at a time.  Other programs wrote them: past the L1."""
    slot, d = tl.arange(0, CHUNK), tl.arange(0, WIDE)
    acc = tl.zeros((ROWS, WIDE), tl.float32)
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    if SINKS:  # a key without a value
        top = tl.load(sinks, mask=keep, other=0.0).to(tl.float32) * _LOG2E
        total += 1.0
    for start in tl.range(0, count, CHUNK):
        here = keep[:, None] & (start + slot < count)[None, :]
        at = tl.arange(0, ROWS)[:, None] * slots + (start + slot)[None, :]
        tops_of = tl.load(tops + at * 2, mask=here, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(tops + at * 2 + 1, mask=here, other=0.0, cache_modifier=".cg")
        inside = here[:, :, None] & (d < DIM)[None, None, :]
        parts = tl.load(values + at[:, :, None] * DIM + d[None, None, :], mask=inside, other=0.0, cache_modifier=".cg")
        new = tl.maximum(top, tl.max(tops_of, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        factor, fade = tl.exp2(tops_of - base[:, None]), tl.exp2(top - base)
        total = total * fade + tl.sum(factor * sums, axis=1)
        acc = acc * fade[:, None] + tl.sum(parts * factor[:, :, None], axis=1)
        top = new
    return acc / tl.where(total > 0.0, total, 1.0)[:, None]


@dataclass(frozen=True)
class Config:
    """``piece`` keys a program, ``block_n`` at a time; ``precision``: of products of float32 inputs."""

    piece: int
    block_n: int
    num_warps: int
    num_stages: int
    precision: str = "ieee"


def tile(rows: int, dtype: torch.dtype) -> int:
    """How many of the queries over one key head a program takes."""
    return min(max(SMALLEST, power(rows)), 16 if dtype == torch.float32 else 64)


def default(dim: int, rows: int, dtype: torch.dtype, paged: bool) -> Config:
    """Tiles that fit registers, and pieces that are read in two turns or four: what a piece leaves behind should stay
    small beside its keys and values.  Where a table says where they lie it is read a stage earlier, which takes twice
    the stages."""
    wide, block_m = max(SMALLEST, power(dim)), tile(rows, dtype)
    piece = 128 if rows <= 4 else 256
    if dtype == torch.float32:
        return Config(piece, 32 if wide <= 128 else 16, 4 if wide <= 64 else 8, 2)
    stages = 4 if wide <= 64 else 3
    return Config(piece, 64 if wide <= 128 else 32, 4 if block_m <= 16 else 8, 2 * stages - 1 if paged else stages)


def space(dim: int, rows: int, dtype: torch.dtype, paged: bool) -> Iterator[Config]:
    """Pieces, warps and stages around the rule's."""
    rule, wide, block_m = default(dim, rows, dtype, paged), max(SMALLEST, power(dim)), tile(rows, dtype)
    if dtype == torch.float32:
        for piece in (128, 256, 512):
            for block_n, warps, precision in ((16, 4, "ieee"), (32, 8, "ieee"), (32, 4, "tf32x3"), (64, 4, "tf32x3")):
                if precision != "ieee" or fits(block_m, block_n, 32 * warps, wide, True):
                    yield Config(piece, block_n, warps, 2, precision)
        return
    for piece in (128, 256, 512):
        for block_n, stages in ((rule.block_n, 2), (rule.block_n, 3), (rule.block_n, 4), (2 * rule.block_n, 2)):
            yield Config(piece, block_n, rule.num_warps, 2 * stages - 1 if paged else stages)
    yield Config(rule.piece, rule.block_n, 12 - rule.num_warps, rule.num_stages)  # 8 for 4, and 4 for 8
    yield Config(rule.piece, rule.block_n // 2, rule.num_warps, rule.num_stages + 1)


def stages(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, config: Config, places: Mapping[str, int], *, causal: bool,
    table: Tensor | None = None, scale: float | None = None, window: int = 0, softcap: float = 0.0,
) -> tuple[Stage, ...]:  # fmt: skip
    """One launch.  q (B, Hq, n, D); k and v as a cache has them; ``places``: where q, k, v and, of lengths, table and
    sinks, what there is stand among the op's arguments.  ``causal``: the last query stands at the last key."""
    if not q.numel():
        return ()
    batch, heads, n, dim = q.shape
    caches, most = [cache_view(x, table) for x in (k, v)], capacity(k, table)
    rows, wide = heads // caches[0].shape[1] * n, max(SMALLEST, power(dim))
    block_m, pieces = tile(rows, q.dtype), max(1, blocks(most, config.piece))
    slots = min(SLOTS, pieces, blocks(window + n - 1, config.piece) + 1 if window else pieces)
    tiles, pairs = blocks(rows, block_m), batch * caches[0].shape[1]
    values: dict[str, Any] = {name: Use(places.get(name, 0)) for name in ("q", "k", "v", "lengths", "table", "sinks")}
    values |= {"out": out, "arrived": torch.zeros(pairs * tiles, dtype=torch.int32, device=q.device)}
    values["values"] = torch.empty((pairs * rows, slots, dim), dtype=torch.float32, device=q.device)
    values["tops"] = torch.empty((pairs * rows, slots, 2), dtype=torch.float32, device=q.device)
    step = unit(q.element_size(), *(s for t in (q, *caches) for s in t.stride()[:3]))
    for name, tensor, by in (("q", q, step), ("k", caches[0], step), ("v", caches[1], step), ("o", out, 1)):
        values |= {f"{name}_{axis}": s // by for axis, s in zip("bhl", tensor.stride()[:3], strict=True)}
    values |= {"scale": (dim**-0.5 if scale is None else float(scale)) * LOG2E, "softcap": float(softcap) * LOG2E}
    values |= {"t_b": 0 if table is None else table.stride(0), "block": 1 if table is None else k.shape[1]}
    values |= {"kv_heads": caches[0].shape[1], "n": n, "rows": rows, "most": most, "slots": slots, "tiles": tiles}
    values |= {"LENGTHS": "lengths" in places, "PAGED": table is not None, "SINKS": "sinks" in places}
    values |= {"CAUSAL": causal, "WINDOW": window, "CAP": softcap > 0, "UNIT": step, "DIM": dim, "WIDE": wide}
    # Values that the program joins at a time: 32 a thread of four warps, 64 of eight, beyond which registers spill.
    joined = 256 * config.num_warps**2
    at_once = min(power(rows), block_m, max(1, joined // (16 * wide)))
    values |= {"ROWS": at_once, "CHUNK": max(1, min(SLOTS, joined // (at_once * wide))), "SLOTS": SLOTS}
    values |= {"PIECE": config.piece, "BLOCK_M": block_m, "BLOCK_N": min(config.block_n, config.piece)}
    values["PRECISION"] = config.precision
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return (Stage(split_kernel, (pairs * tiles * slots,), values, options),)
