"""Attention of packed sequences on NVIDIA GPUs: each program finds its sequence among the offsets; none is padded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.gpu import attention
from fusegen.kernels.gpu.attention import Config
from fusegen.kernels.gpu.attention_tile import LOG2E, load_rows, walk, widths
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, meta, power, unit
from fusegen.kernels.gpu.tune import SHARED_BYTES, Tunable
from fusegen.kernels.op import Kernel

Q, K, V, CU_Q, CU_K, SINKS = range(6)  # positions of the tensors in the schema
_LOG2E = tl.constexpr(LOG2E)


@triton.jit
def _bounds(cu, sequence, sequences, total):
    """Rows [first, last) of a sequence; the one past the last has what rows are left."""
    first = tl.maximum(0, tl.minimum(tl.load(cu + sequence), total))
    last = tl.load(cu + sequence + 1, mask=sequence < sequences, other=total)
    return first, tl.maximum(first, tl.minimum(last, total))


@triton.jit
def _sequence_of(cu_q, tile, sequences, BLOCK_M: tl.constexpr, MANY: tl.constexpr):
    """The sequence that tile ``tile`` of BLOCK_M queries belongs to, and its number there.  Sequence s has the tiles
    from cu_q[s] // BLOCK_M + s on: as many as it needs at the least.  All are compared at once, MANY at a time: a
    search by halves waits for memory at each step."""
    low = -1
    for start in tl.range(0, sequences + 1, MANY):
        at = start + tl.arange(0, MANY)
        first = tl.load(cu_q + at, mask=at <= sequences, other=2**31 - 1) // BLOCK_M + at
        low += tl.sum((first <= tile).to(tl.int32))
    return low, tile - tl.load(cu_q + low) // BLOCK_M - low


@triton.jit
def varlen_kernel(
    q, k, v, cu_q, cu_k, sinks, out, scale, softcap,
    q_l, q_h, k_l, k_h, v_l, v_h, o_l, o_h, heads, share, sequences, queries, keys,
    UNIT: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SINKS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, FOLD: tl.constexpr, MANY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head of one sequence.  Strides are in units of UNIT elements."""
    h = (tl.program_id(0) % heads).to(tl.int64)
    tile = tl.program_id(0) // heads
    if CAUSAL:
        tile = tl.num_programs(0) // heads - 1 - tile  # a sequence's longest first
    sequence, tile = _sequence_of(cu_q, tile, sequences, BLOCK_M, MANY)
    first, last = _bounds(cu_q, sequence, sequences, queries)
    first += tile * BLOCK_M
    if first >= last:
        return
    begin, stop = _bounds(cu_k, sequence, sequences, keys)
    length = tl.where(sequence < sequences, stop - begin, 0)
    q_l, k_l, v_l, o_l = q_l * UNIT, k_l * UNIT, v_l * UNIT, o_l * UNIT
    near = tl.arange(0, BLOCK_M)
    at = length - (last - first)  # of the tile's first query
    rows = at + near
    q += h * q_h * UNIT + first.to(tl.int64) * q_l
    k += h // share * k_h * UNIT + begin.to(tl.int64) * k_l
    v += h // share * v_h * UNIT + begin.to(tl.int64) * v_l
    out += h * o_h * UNIT + first.to(tl.int64) * o_l
    q0 = load_rows(q, near, q_l, last - first, 0, D0, DIM)
    q1 = load_rows(q, near, q_l, last - first, D0, D1, DIM) if D1 > 0 else q0
    acc0 = tl.zeros((BLOCK_M, D0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, D1 if D1 > 0 else 1), tl.float32)
    top, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    end = tl.minimum(length, tl.maximum(at + BLOCK_M, 0)) if CAUSAL else length
    low = 0
    # Blocks before ``sure`` are whole and, where CAUSAL, before every query of this tile.
    sure = (tl.minimum(length, tl.maximum(at + 1, 0)) if CAUSAL else length) // BLOCK_N * BLOCK_N
    if WINDOW > 0:
        low = tl.maximum(at - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        sure = low
        end = tl.minimum(end, tl.maximum(at + BLOCK_M - 1 + WINDOW, 0))
    acc0, acc1, top, total = walk(
        q0, q1, acc0, acc1, top, total, k, v, k, rows, low, sure, end, length, scale, k_l, v_l, 0, 0, queries, softcap,
        DIM, D0, D1, 0, CAUSAL, True, WINDOW, CAP, FOLD, BLOCK_N, PRECISION,
    )  # fmt: skip
    share_of = 1.0 / tl.where(total > 0.0, total, 1.0)  # nothing to attend: zeros
    if SINKS:
        sink = tl.load(sinks + h).to(tl.float32) * _LOG2E
        new = tl.maximum(top, sink)
        share_of = tl.exp2(top - new) / (total * tl.exp2(top - new) + tl.exp2(sink - new))
    keep, d = (near < last - first)[:, None], tl.arange(0, D0)[None, :]
    to = out + near[:, None] * o_l
    tl.store(to + d, (acc0 * share_of[:, None]).to(out.dtype.element_ty), mask=keep & (d < DIM))
    if D1 > 0:
        d = D0 + tl.arange(0, D1)[None, :]
        tl.store(to + d, (acc1 * share_of[:, None]).to(out.dtype.element_ty), mask=keep & (d < DIM))


def _plain(q: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, bool, None]:
    """The arguments of ``attention`` with the same tiles: sequences of some length, which is data."""
    x = q.new_empty((1, q.shape[1], 1024, q.shape[2]), device="meta")
    return (x, x, x, None, None, False, None)


def key(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Any, sinks: Any, causal: bool, *rest: Any) -> str:
    """Head dimension and dtype, and what closes keys."""
    _, window, softcap = rest
    kinds = ("causal " if causal else "") + ("window " if window else "") + ("softcap " if softcap else "")
    return f"{kinds}{q.shape[-1]} {str(q.dtype).removeprefix('torch.')}"


def default(q: Tensor, *rest: Any, limit: int = SHARED_BYTES) -> Config:
    """That of ``attention``, with smaller tiles for wide heads: finding the sequence and its bounds takes registers
    too."""
    found = attention.default(*_plain(q), limit=limit)
    wide = sum(widths(q.shape[-1], found.split))
    if q.dtype != torch.float32 and wide > 160:
        return replace(found, block_m=64, block_n=32, num_warps=8, num_stages=2)
    if q.dtype != torch.float32 and wide > 96 and limit < SHARED_BYTES:
        return replace(found, block_n=32)
    return found


def space(q: Tensor, *rest: Any) -> Iterator[Config]:
    """That of ``attention``."""
    yield from attention.space(*_plain(q))


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """One launch."""
    q, k, v, cu_q, cu_k, sinks, causal, scale, window, softcap = args
    (queries, heads, dim), out, sequences = q.shape, outs[0], cu_q.shape[0] - 1
    strided = {"q": q, "k": k, "v": v, "o": out}
    step = unit(q.element_size(), *(s for t in strided.values() for s in t.stride()[:2]))
    values: dict[str, Any] = {"q": Use(Q), "k": Use(K), "v": Use(V), "out": out, "cu_q": Use(CU_Q)}
    values |= {"cu_k": Use(CU_Q if cu_k is None else CU_K), "sinks": Use(Q if sinks is None else SINKS)}
    for name, tensor in strided.items():
        values |= {f"{name}_{axis}": s // step for axis, s in zip("lh", tensor.stride()[:2], strict=True)}
    by = (dim**-0.5 if scale is None else float(scale)) * LOG2E
    values |= {"scale": by, "FOLD": by > 0.0 and softcap <= 0.0, "softcap": float(softcap) * LOG2E}
    values |= {"heads": heads, "share": heads // max(1, k.shape[1]), "sequences": sequences, "queries": queries}
    values |= {"keys": k.shape[0], "UNIT": step, "DIM": dim, "SINKS": sinks is not None, "CAUSAL": bool(causal)}
    values |= dict(zip(("D0", "D1"), widths(dim, config.split), strict=True))
    values |= {"WINDOW": window, "CAP": softcap > 0, "MANY": min(power(sequences + 1), 1024)}
    values |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "PRECISION": config.precision}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    tiles = queries // config.block_m + sequences + 1 if queries else 0
    return (Stage(varlen_kernel, (tiles * heads,), values, options),)


def decline(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, sinks: Tensor | None,
            *rest: Any) -> str | None:  # fmt: skip
    """What ``attention`` declines, and offsets or sinks that are not dense."""
    for name, tensor in (("cu_q", cu_q), ("cu_k", cu_k), ("sinks", sinks)):
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} of stride {tensor.stride(0)} is not contiguous"
    return attention.decline(q, k, v, None)


def small(q: Tensor, *rest: Any) -> Iterator[Config]:
    yield Config(16, 16, 4, 1, split=True)


def specimens() -> Iterator[Named]:
    """Head dimensions by dtype, then windows, caps and sinks in bfloat16."""
    for dtype, kind in SHORT.items():
        for dim in (64, 80, 128, 256) if dtype == torch.bfloat16 else (64, 128):
            yield _specimen(f"{kind} d{dim}", dtype, dim)
    bf16 = torch.bfloat16
    yield _specimen("bf16 d128 not causal", bf16, 128, causal=False)
    yield _specimen("bf16 d64 window, sinks", bf16, 64, window=128, sinks=True)
    yield _specimen("bf16 d256 window, softcap", bf16, 256, window=4096, softcap=50.0)


def _specimen(name: str, dtype: torch.dtype, dim: int, causal: bool = True, window: int = 0, softcap: float = 0.0,
              sinks: bool = False) -> Named:  # fmt: skip
    q, k = (meta(4096, h, dim, dtype=dtype) for h in (32, 8))
    cu, sink = meta(9, dtype=torch.int32), meta(32, dtype=dtype) if sinks else None
    return name, lambda: (q, k, torch.empty_like(k), cu, None, sink, causal, None, window, softcap)


TUNABLE = Tunable("attention_varlen", Config, key, default, space, stages, Path(__file__), small)
KERNELS = [Kernel("attention_varlen.triton", "cuda", decline, TUNABLE.bind)]
