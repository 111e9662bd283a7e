"""Decoding attention on NVIDIA GPUs: a program for each piece of a sequence's keys, then one to join a query's pieces.

The queries that share a key head are taken together, so that it is read once.  Pieces start at multiples of their size
and are joined in order: what is added to what depends on the sequence's own length alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu.attention_tile import LOG2E, SMALLEST, capped, fits
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, meta, power, unit
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.kv_cache import cache_view, capacity
from fusegen.kernels.op import FLOATS, Kernel

Q, K, V, LENGTHS, TABLE, SINKS = range(6)  # positions of the tensors in the schema
WIDEST = 256  # the largest head dimension
CHUNK = 16  # pieces joined at a time
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _span(lengths, b, most, n, PIECE: tl.constexpr, WINDOW: tl.constexpr):
    """A sequence's length, the first piece that any of its queries attends, and how many there are from it on."""
    length = tl.maximum(tl.minimum(tl.load(lengths + b).to(tl.int32), most), 0)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - n - WINDOW + 1, 0) // PIECE
    return length, first, tl.cdiv(length, PIECE) - first


@triton.jit
def piece_kernel(
    q, k, v, lengths, table, values, tops, scale, softcap,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, t_b, kv_heads, n, rows, most, block, slots, tiles,
    UNIT: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, PAGED: tl.constexpr, WINDOW: tl.constexpr,
    CAP: tl.constexpr, PIECE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M of the ``rows`` queries over one key head, over one piece of the keys.  Row r is query r % n of head
    r // n of those that share it.  Leaves weighted values (B, Hkv, rows, slots, DIM), and their maximum and sum."""
    slot, rest = tl.program_id(0) % slots, tl.program_id(0) // slots
    tile, pair = rest % tiles, rest // tiles
    b, h = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    length, first, count = _span(lengths, b, most, n, PIECE, WINDOW)
    if slot >= count:
        return
    begin = (first + slot) * PIECE
    row, d, inner = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, WIDE), tl.arange(0, BLOCK_N)
    place, share = length - n + row % n, rows // n
    head = h * share + row // n
    at = q + (b * q_b + head * q_h + (row % n) * q_l)[:, None] * UNIT + d[None, :]
    queries = tl.load(at, mask=(row < rows)[:, None] & (d < DIM)[None, :], other=0.0)
    acc = tl.zeros((BLOCK_M, WIDE), tl.float32)
    top, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    k += h * k_h * UNIT
    v += h * v_h * UNIT
    for start in tl.range(begin, tl.minimum(begin + PIECE, length), BLOCK_N):
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
        open_to = key[None, :] <= place[:, None]
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


@triton.jit
def join_kernel(
    values, tops, lengths, sinks, out, o_b, o_h, o_l, heads, n, most, slots,
    DIM: tl.constexpr, WIDE: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, PIECE: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One query: its pieces' weighted values, put together in order, CHUNK at a time."""
    r = tl.program_id(0).to(tl.int64)
    pair, i = r // n, r % n
    b, h = pair // heads, pair % heads
    _, _, count = _span(lengths, b, most, n, PIECE, WINDOW)
    slot, d = tl.arange(0, CHUNK), tl.arange(0, WIDE)
    top = tl.full((CHUNK,), float("-inf"), tl.float32)
    for start in tl.range(0, count, CHUNK):
        here = tops + (r * slots + start + slot) * 2
        top = tl.maximum(top, tl.load(here, mask=start + slot < count, other=float("-inf")))
    highest = tl.max(top, axis=0)
    if SINKS:
        sink = tl.load(sinks + h).to(tl.float32) * _LOG2E
        highest = tl.maximum(highest, sink)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    acc, total = tl.zeros((WIDE,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    for start in tl.range(0, count, CHUNK):
        at = r * slots + start + slot
        keep = start + slot < count
        factor = tl.exp2(tl.load(tops + at * 2, mask=keep, other=float("-inf")) - base)
        total += factor * tl.load(tops + at * 2 + 1, mask=keep, other=0.0)
        part = tl.load(values + at[:, None] * DIM + d[None, :], mask=keep[:, None] & (d < DIM)[None, :], other=0.0)
        acc += tl.sum(part * factor[:, None], axis=0)
    whole = tl.sum(total, axis=0)
    if SINKS:
        whole += tl.exp2(sink - base)
    to = out + b * o_b + h * o_h + i * o_l + d
    tl.store(to, (acc / tl.where(whole > 0.0, whole, 1.0)).to(out.dtype.element_ty), mask=d < DIM)


@dataclass(frozen=True)
class Config:
    """``piece`` keys a program, ``block_n`` at a time; ``precision``: of products of float32 inputs."""

    piece: int
    block_n: int
    num_warps: int
    num_stages: int
    precision: str = "ieee"


def _tile(q: Tensor, k: Tensor, table: Tensor | None) -> tuple[int, int]:
    """The queries over one key head, and how many of them a program takes."""
    rows = q.shape[1] // max(1, cache_view(k, table).shape[1]) * q.shape[2]
    return rows, min(max(SMALLEST, power(rows)), 16 if q.dtype == torch.float32 else 64)


def key(q: Tensor, k: Tensor, v: Tensor, lengths: Any, table: Any, *rest: Any) -> str:
    """Head dimension, dtype and queries a program: not the batch nor the capacity, on which no bit may depend."""
    return f"{q.shape[-1]} {_tile(q, k, table)[1]} {str(q.dtype).removeprefix('torch.')}"


def default(q: Tensor, k: Tensor, v: Tensor, lengths: Any, table: Any, *rest: Any, limit: int = 0) -> Config:
    """Pieces of 256 keys; tiles that fit registers."""
    wide, block_m = max(SMALLEST, power(q.shape[-1])), _tile(q, k, table)[1]
    if q.dtype == torch.float32:
        return Config(256, 32 if wide <= 128 else 16, 4 if wide <= 64 else 8, 2)
    return Config(256, 64 if wide <= 128 else 32, 4 if block_m <= 16 else 8, 2 if wide <= 64 else 3)


def space(q: Tensor, k: Tensor, v: Tensor, lengths: Any, table: Any, *rest: Any) -> Iterator[Config]:
    """Pieces of 128 to 1024 keys, in the tiles that fit."""
    wide, exact = max(SMALLEST, power(q.shape[-1])), q.dtype == torch.float32
    block_m = _tile(q, k, table)[1]
    for block_n in (16, 32, 64) if exact else (32, 64, 128):
        for warps in (2, 4, 8):
            for precision in ("ieee", "tf32x3") if exact else ("ieee",):
                scalar = exact and precision == "ieee"
                if scalar and not fits(block_m, block_n, 32 * warps, wide, True):
                    continue
                if not scalar and (block_m + block_n) * wide // (32 * warps) > 160:
                    continue
                for piece in (128, 256, 512, 1024):
                    for stages in (2, 3, 4):
                        if 2 * stages * block_n * wide * q.element_size() <= 200 * 1024:
                            yield Config(piece, block_n, warps, stages, precision)


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """Two launches: the pieces, then the joins."""
    q, k, v, _, table, sinks, scale, window, softcap = args
    (batch, heads, n, dim), out, most = q.shape, outs[0], capacity(k, table)
    if not q.numel():
        return ()
    caches = [cache_view(x, table) for x in (k, v)]
    kv_heads = caches[0].shape[1]
    rows, block_m = _tile(q, k, table)
    slots = blocks(most, config.piece)
    slots = min(slots, blocks(window + n - 1, config.piece) + 1) if window else slots
    tiles = blocks(rows, block_m)
    step = unit(q.element_size(), *(s for t in (q, *caches) for s in t.stride()[:3]))
    parts = torch.empty((batch * heads * n, max(slots, 1), dim), dtype=torch.float32, device=q.device)
    tops = torch.empty((*parts.shape[:2], 2), dtype=torch.float32, device=q.device)
    common = {"values": parts, "tops": tops, "lengths": Use(LENGTHS), "n": n, "most": most, "slots": max(slots, 1)}
    common |= {"DIM": dim, "WIDE": max(SMALLEST, power(dim)), "WINDOW": window, "PIECE": config.piece}
    values: dict[str, Any] = common | {
        "q": Use(Q),
        "k": Use(K),
        "v": Use(V),
        "table": Use(LENGTHS if table is None else TABLE),
    }
    for name, tensor in (("q", q), ("k", caches[0]), ("v", caches[1])):
        values |= {f"{name}_{axis}": s // step for axis, s in zip("bhl", tensor.stride()[:3], strict=True)}
    values |= {"scale": (dim**-0.5 if scale is None else float(scale)) * LOG2E, "softcap": float(softcap) * LOG2E}
    values |= {"t_b": 0 if table is None else table.stride(0), "kv_heads": kv_heads, "rows": rows, "tiles": tiles}
    values |= {
        "block": 1 if table is None else k.shape[1],
        "UNIT": step,
        "PAGED": table is not None,
        "CAP": softcap > 0,
    }
    values |= {"BLOCK_M": block_m, "BLOCK_N": min(config.block_n, config.piece), "PRECISION": config.precision}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    joined = common | {"sinks": Use(Q if sinks is None else SINKS), "out": out, "heads": heads}
    joined |= {f"o_{axis}": s for axis, s in zip("bhl", out.stride()[:3], strict=True)}
    joined |= {"SINKS": sinks is not None, "CHUNK": CHUNK}
    join = Stage(join_kernel, (batch * heads * n,), joined, {"num_warps": 4})
    return (Stage(piece_kernel, (batch * kv_heads * tiles * slots,), values, options), join)


def decline(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor | None, sinks: Tensor | None,
            *rest: Any) -> str | None:  # fmt: skip
    """Head dimensions beyond 256, last strides other than 1, dtypes with no product, integers that are not dense."""
    dim = q.shape[-1]
    if not 0 < dim <= WIDEST:
        return f"head dimension {dim} is not in 1..{WIDEST}"
    if q.dtype not in FLOATS:
        return f"q, k, v are {q.dtype}"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if dim > 1 and tensor.numel() and tensor.stride(-1) != 1:
            return f"the last stride of {name} is {tensor.stride(-1)}, not 1"
    if table is not None and table.numel() and table.stride(1) != 1:
        return f"the last stride of block_table is {table.stride(1)}, not 1"
    for name, vector in (("lengths", lengths), ("sinks", sinks)):
        if vector is not None and not vector.is_contiguous():
            return f"{name} of stride {vector.stride(0)} is not contiguous"
    return None


def small(*args: Any) -> Iterator[Config]:
    yield Config(32, 16, 4, 1)


def specimens() -> Iterator[Named]:
    """Head dimensions by dtype, then paged caches, many queries, windows, caps and sinks in bfloat16."""
    for dtype, kind in SHORT.items():
        for dim in (64, 80, 128, 256) if dtype == torch.bfloat16 else (64, 128, 256):
            yield _specimen(f"{kind} d{dim}", dtype, dim)
    bf16 = torch.bfloat16
    yield _specimen("bf16 d128 paged", bf16, 128, paged=True)
    yield _specimen("fp32 d128 paged", torch.float32, 128, paged=True)
    yield _specimen("bf16 d128 eight queries", bf16, 128, n=8)
    yield _specimen("bf16 d64 window, sinks", bf16, 64, window=128, sinks=True)
    yield _specimen("bf16 d256 window, softcap", bf16, 256, window=4096, softcap=50.0)


def _specimen(name: str, dtype: torch.dtype, dim: int, n: int = 1, paged: bool = False, window: int = 0,
              softcap: float = 0.0, sinks: bool = False) -> Named:  # fmt: skip
    q = meta(4, n, 32, dim, dtype=dtype).transpose(1, 2)
    k = meta(1025, 16, 8, dim, dtype=dtype) if paged else meta(4, 8, 4096, dim, dtype=dtype)
    table, lengths = meta(4, 256, dtype=torch.int32) if paged else None, meta(4, dtype=torch.int32)
    sink = meta(32, dtype=dtype) if sinks else None
    return name, lambda: (q, k, torch.empty_like(k), lengths, table, sink, None, window, softcap)


TUNABLE = Tunable("attention_decode", Config, key, default, space, stages, Path(__file__), small)
KERNELS = [Kernel("attention_decode.triton", "cuda", decline, TUNABLE.bind)]
