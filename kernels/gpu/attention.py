"""Attention on NVIDIA GPUs: one pass over the keys with a running maximum (Milakov & Gimelshein 2018; Dao et al. 2022).

Head dimensions need be no power of two: a tile is either padded in registers, or split in two powers of two (80 = 64 +
16), whichever the configuration says; nothing is padded in memory.  Exponentials are of base 2, with log2(e) in the
scale.  Products of float32 inputs are exact to float32 ("ieee"), or three tf32 products each ("tf32x3", whose error is
near float32's) where tuning found that faster and inside the op's bound.  A few queries over many keys go the way of
decoding instead, the keys split among programs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusegen.kernels.attention import heads, spread_mask
from fusegen.kernels.gpu import attention_split
from fusegen.kernels.gpu.attention_tile import LOG2E, SMALLEST, fits, load_rows, walk, widths
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, Use, blocks, meta, power, unit
from fusegen.kernels.gpu.tune import SHARED_BYTES, Tunable
from fusegen.kernels.op import FLOATS, Kernel

Q, K, V, MASK, LENGTHS = range(5)  # positions of the tensors in the schema
WIDEST = 256  # the largest head dimension
MANY = 512  # keys from which on a few queries' are split among programs
_NO_MASK, _BOOLEAN, _ADDITIVE = range(3)


@triton.jit
def attention_kernel(
    q, k, v, mask, key_lengths, out, scale,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, m_b, m_h, m_q, m_k, o_b, o_h, o_l, heads, share, queries, keys,
    UNIT: tl.constexpr, DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASK: tl.constexpr,
    LENGTHS: tl.constexpr, CAUSAL: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head.  Strides of q, k, v and out are in units of UNIT elements; ``share`` query heads
    have one key head; DIM = D0 + D1, or less where the last is padded in registers; MASK: 0 none, 1 boolean, 2 added.
    """
    tiles = tl.cdiv(queries, BLOCK_M)
    tile, bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest first
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    q_l, k_l, v_l, o_l = q_l * UNIT, k_l * UNIT, v_l * UNIT, o_l * UNIT
    first = tile * BLOCK_M
    rows, near = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_M)
    q += (b * q_b + h * q_h) * UNIT + first.to(tl.int64) * q_l
    k += (b * k_b + h // share * k_h) * UNIT
    v += (b * v_b + h // share * v_h) * UNIT
    out += (b * o_b + h * o_h) * UNIT + first.to(tl.int64) * o_l
    mask += b * m_b + h * m_h
    q0 = load_rows(q, near, q_l, queries - first, 0, D0, DIM)
    q1 = load_rows(q, near, q_l, queries - first, D0, D1, DIM) if D1 > 0 else q0
    acc0 = tl.zeros((BLOCK_M, D0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, D1 if D1 > 0 else 1), tl.float32)
    top, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    length = (
        tl.maximum(tl.minimum(tl.load(key_lengths + b).to(tl.int32), keys), 0) if LENGTHS else tl.cast(keys, tl.int32)
    )
    end = tl.minimum(length, first + BLOCK_M) if CAUSAL else length
    # Blocks before ``sure`` are whole and, where CAUSAL, before every query of this tile.
    sure = (tl.minimum(length, first + 1) if CAUSAL else length) // BLOCK_N * BLOCK_N
    acc0, acc1, top, total = walk(
        q0, q1, acc0, acc1, top, total, k, v, mask, rows, 0, sure, end, length, scale, k_l, v_l, m_q, m_k, queries, 0.0,
        DIM, D0, D1, MASK, CAUSAL, MASK > 0, 0, False, FOLD, BLOCK_N, PRECISION,
    )  # fmt: skip
    share_of = (1.0 / tl.where(total > 0.0, total, 1.0))[:, None]  # nothing to attend: zeros
    keep, d = (rows < queries)[:, None], tl.arange(0, D0)[None, :]
    at = out + near[:, None] * o_l
    tl.store(at + d, (acc0 * share_of).to(out.dtype.element_ty), mask=keep & (d < DIM))
    if D1 > 0:
        d = D0 + tl.arange(0, D1)[None, :]
        tl.store(at + d, (acc1 * share_of).to(out.dtype.element_ty), mask=keep & (d < DIM))


@dataclass(frozen=True)
class Config:
    """``block_m`` queries by ``block_n`` keys; ``split``: the head dimension in two powers of two; ``precision``: of
    products of float32 inputs; ``piece``: keys a program where they are split among programs, else 0."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    split: bool = False
    precision: str = "ieee"
    piece: int = 0


def _few(q: Tensor, k: Tensor, mask: Any, causal: bool) -> int:
    """Queries over a key head, where these are too few to fill a GPU, the keys many and all open to each; else 0."""
    rows = heads(q).shape[1] // max(1, heads(k).shape[1]) * q.shape[-2]
    return rows if mask is None and not causal and rows <= SMALLEST and k.shape[-2] >= MANY else 0


def _pieces(found: attention_split.Config) -> Config:
    return Config(SMALLEST, found.block_n, found.num_warps, found.num_stages, False, found.precision, found.piece)


def shared(config: Config, q: Tensor, mask: Tensor | None) -> int:
    """About the shared memory (bytes) a configuration takes: the queries, and the pipelined keys, values and mask."""
    wide = sum(widths(q.shape[-1], config.split)) * q.element_size()
    masks = 0 if mask is None else (config.num_stages - 1) * config.block_m * config.block_n * mask.element_size()
    return wide * (config.block_m + 2 * config.num_stages * config.block_n) + masks


def key(q: Tensor, k: Tensor, v: Tensor, mask: Any, key_lengths: Any, causal: bool, scale: Any) -> str:
    """Head dimension, dtype, lengths to the next power of two, and what masks there are."""
    kinds = ("causal " if causal else "") + ("" if mask is None else f"{mask.dtype} ".removeprefix("torch."))
    return f"{kinds}{q.shape[-1]} {power(q.shape[-2])}x{power(k.shape[-2])} {str(q.dtype).removeprefix('torch.')}"


def _split(dim: int) -> bool:
    """Whether a head is taken in two powers of two: wider than 64, where that saves a quarter of the arithmetic."""
    return dim > 64 and sum(widths(dim, True)) * 4 <= 3 * sum(widths(dim, False))


def default(q: Tensor, k: Tensor, v: Tensor, mask: Any, lengths: Any, causal: bool, scale: Any,
            limit: int = SHARED_BYTES) -> Config:  # fmt: skip
    """Tiles that fit registers and ``limit`` bytes of shared memory."""
    dim = q.shape[-1]
    if rows := _few(q, k, mask, causal):
        return _pieces(attention_split.default(dim, rows, q.dtype, False))
    split = _split(dim)
    wide = sum(widths(dim, split))
    if q.dtype == torch.float32:
        found = Config(64, 32, 8, 1, split) if wide <= 64 else Config(32 if wide <= 160 else 16, 16, 4, 1, split)
        found = replace(found, num_warps=4 if 80 < wide <= 128 else 8)
    elif limit < SHARED_BYTES and wide > 128:  # before sm_90 products read their operands from registers
        found = Config(128 if wide <= 160 else 64, 32, 8, 2, split)
    elif limit < SHARED_BYTES:
        found = Config(128, 64, 8, 3, split)
    else:
        found = _hopper(dim, wide, split, q.shape[-2], k.shape[-2], mask is None)
    block_m = min(found.block_m, max(SMALLEST, power(q.shape[-2])))
    block_n = min(found.block_n, max(SMALLEST, power(k.shape[-2])))
    warps = found.num_warps if block_m == found.block_m or q.dtype == torch.float32 else 4
    found = replace(found, block_m=block_m, block_n=block_n, num_warps=warps)
    while shared(found, q, mask) > limit and found.num_stages > 1:
        found = replace(found, num_stages=found.num_stages - 1)
    while shared(found, q, mask) > limit and found.block_n > SMALLEST:
        found = replace(found, block_n=found.block_n // 2)
    return found


def _hopper(dim: int, wide: int, split: bool, queries: int, keys: int, bare: bool) -> Config:
    """From sm_90 on, by measurement on an H200.  Four warps of 64 queries make programs small, so that several share a
    multiprocessor and few queries fill more of them: up to 1024, and where registers are short.  Of more, 128 go
    together: in four warps, two products of 64 each, one's exponentials beside the other's product, where no column is
    padded (1.10 times at 64) or the keys are few (1.55 times at 40 on 77); else in eight."""
    if (wide <= 160 and queries <= 1024) or (dim == wide <= 128 and (dim > 64 or not bare)):
        return Config(64, 64, 4, 3, split)
    four = bare and wide <= 64 and (dim == wide or keys <= 128)
    return Config(128, 64, 4 if four else 8, 3 if wide <= 160 else 2, split)


# Queries, keys, warps and stages that tuning chose, and what lay near them.
_TILES = ((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3),
          (128, 128, 8, 2), (128, 32, 4, 3), (16, 64, 4, 3))  # fmt: skip
_EXACT = ((64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 4, 1), (16, 16, 4, 1), (16, 32, 4, 2), (64, 64, 8, 1))


def space(q: Tensor, k: Tensor, v: Tensor, mask: Any, lengths: Any, causal: bool, *rest: Any) -> Iterator[Config]:
    """The tiles whose registers and shared memory fit."""
    dim, exact, split = q.shape[-1], q.dtype == torch.float32, _split(q.shape[-1])
    if rows := _few(q, k, mask, causal):
        yield from map(_pieces, attention_split.space(dim, rows, q.dtype, False))
    queries, keys = (max(SMALLEST, power(t.shape[-2])) for t in (q, k))
    wide = sum(widths(dim, split))
    for block_m, block_n, warps, stages in _EXACT if exact else _TILES:
        for precision in ("ieee", "tf32x3") if exact else ("ieee",):
            config = Config(block_m, block_n, warps, stages, split, precision)
            small = block_m <= queries and block_n <= keys and shared(config, q, mask) <= SHARED_BYTES
            if small and fits(block_m, block_n, 32 * warps, wide, exact and precision == "ieee"):
                yield config


def _masking(mask: Tensor | None, q: Tensor, k: Tensor) -> tuple[int, tuple[int, ...]]:
    """The kind of mask, and its strides broadcast to (B, Hq, Lq, Lk)."""
    if mask is None:
        return _NO_MASK, (0, 0, 0, 0)
    return _BOOLEAN if mask.dtype == torch.bool else _ADDITIVE, spread_mask(mask, q, k).stride()


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """One launch."""
    q, k, v, mask, key_lengths, causal, scale = args
    if config.piece:
        places = {"q": Q, "k": K, "v": V} | ({} if key_lengths is None else {"lengths": LENGTHS})
        split = attention_split.Config(
            config.piece, config.block_n, config.num_warps, config.num_stages, config.precision
        )
        q, k, v, out = (heads(t) for t in (q, k, v, outs[0]))
        return attention_split.stages(out, q, k, v, split, places, causal=False, scale=scale)
    kind, strides = _masking(mask, q, k)
    q, k, v, out = (heads(t) for t in (q, k, v, outs[0]))
    (batch, count, queries, dim), keys = q.shape, k.shape[2]
    step = unit(q.element_size(), *(s for t in (q, k, v, out) for s in t.stride()[:3]))
    values: dict[str, Any] = {"q": Use(Q), "k": Use(K), "v": Use(V), "out": out}
    values |= {"mask": Use(Q if mask is None else MASK), "key_lengths": Use(Q if key_lengths is None else LENGTHS)}
    for name, tensor in (("q", q), ("k", k), ("v", v), ("o", out)):
        values |= {f"{name}_{axis}": s // step for axis, s in zip("bhl", tensor.stride()[:3], strict=True)}
    values |= {f"m_{axis}": s for axis, s in zip("bhqk", strides, strict=True)}
    values |= {"heads": count, "share": count // max(1, k.shape[1]), "queries": queries, "keys": keys}
    by = (dim**-0.5 if scale is None else float(scale)) * LOG2E
    values |= {"scale": by, "FOLD": by > 0.0 and kind != _ADDITIVE, "UNIT": step, "DIM": dim}
    values |= dict(zip(("D0", "D1"), widths(dim, config.split), strict=True))
    values |= {"MASK": kind, "LENGTHS": key_lengths is not None, "CAUSAL": bool(causal)}
    values |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "PRECISION": config.precision}
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return (Stage(attention_kernel, (blocks(queries, config.block_m) * batch * count,), values, options),)


def decline(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: Any) -> str | None:
    """Head dimensions beyond 256, last strides other than 1, mixed dtypes, and dtypes with no product here."""
    dim = q.shape[-1]
    if not 0 < dim <= WIDEST or v.shape[-1] != dim:
        return f"head dimensions {dim} and {v.shape[-1]} are not one in 1..{WIDEST}"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in FLOATS:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if dim > 1 and tensor.numel() and tensor.stride(-1) != 1:
            return f"the last stride of {name} is {tensor.stride(-1)}, not 1"
    if mask is not None and mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        return f"the mask is {mask.dtype}, neither boolean nor floating"
    return None


def small(q: Tensor, k: Tensor, v: Tensor, mask: Any, lengths: Any, causal: bool, *rest: Any) -> Iterator[Config]:
    yield Config(16, 16, 4, 1, split=True)
    if mask is None and not causal:
        yield Config(16, 16, 4, 1, piece=32)


def specimens() -> Iterator[Named]:
    """Head dimensions by dtype, then masks, lengths, few keys, many queries and few in bfloat16."""
    for dtype, kind in SHORT.items():
        for dim in (40, 64, 72, 80, 96, 128, 160, 256) if dtype != torch.float16 else (64, 128):
            yield _specimen(f"{kind} d{dim}", dtype, dim)
    bf16, mask = torch.bfloat16, meta(2, 8, 1024, 1024, dtype=torch.bool)
    yield _specimen("bf16 d64 causal", bf16, 64, causal=True)
    yield _specimen("bf16 d40 on 77 keys", bf16, 40, keys=77)
    yield _specimen("bf16 d64 boolean mask", bf16, 64, mask=mask)
    yield _specimen("bf16 d64 added mask", bf16, 64, mask=mask.to(bf16))
    yield _specimen("bf16 d64 key lengths", bf16, 64, lengths=meta(2, dtype=torch.int64))
    for dim, keys in ((64, 4096), (40, 4096), (40, 77)):
        yield _specimen(f"bf16 d{dim} 4096 on {keys}", bf16, dim, keys=keys, queries=4096)
    yield _specimen("bf16 d64 4096 causal", bf16, 64, keys=4096, causal=True, queries=4096)
    yield _specimen("bf16 d128 one on 2048", bf16, 128, keys=2048, queries=1)


def _specimen(name: str, dtype: torch.dtype, dim: int, keys: int = 1024, mask: Tensor | None = None,
              lengths: Tensor | None = None, causal: bool = False, queries: int = 1024) -> Named:  # fmt: skip
    q, k = (meta(2, n, 8, dim, dtype=dtype).transpose(1, 2) for n in (queries, keys))
    return name, lambda: (q, k, torch.empty_like(k), mask, lengths, causal, None)


TUNABLE = Tunable("attention", Config, key, default, space, stages, Path(__file__), small)
KERNELS = [Kernel("attention.triton", "cuda", decline, TUNABLE.bind)]
