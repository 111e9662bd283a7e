"""Attention of the newest tokens over a key-value cache, as in decoding, split over the keys (Flash-Decoding, 2023).

The cache is contiguous, or in blocks found through a table (Kwon et al. 2023, PagedAttention).  Sliding window: Beltagy
et al. 2020; soft cap of the scores: Gemma 2 (2024); sinks, a learnt logit a head without a value: gpt-oss (2025).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusegen.kernels.attention_decode_cases import CASES
from fusegen.kernels.draw import Draw
from fusegen.kernels.kv_cache import (
    attend,
    cache_view,
    capacity,
    check_cache,
    check_extras,
    check_integers,
    gather,
    spelled,
)
from fusegen.kernels.op import Cost, Op, Tolerance, register

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor? block_table=None, Tensor? sinks=None, float? scale=None,"
    " int window=0, float softcap=0.0) -> Tensor"
)


def allocate(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None = None, sinks: Tensor | None = None,
    scale: float | None = None, window: int = 0, softcap: float = 0.0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised output: q's shape, laid out (B, n, Hq, D): joining the heads is free.  Raises ValueError."""
    if q.dim() != 4:
        raise ValueError(f"attention_decode: q {tuple(q.shape)} is not (B, Hq, n, D)")
    check_cache("attention_decode", k, v, q.shape[0], block_table)
    cache = cache_view(k, block_table)
    if cache.shape[3] != q.shape[3] or k.dtype != q.dtype:
        ours, theirs = (f"dimension {x.shape[-1]} in {x.dtype}" for x in (q, cache))
        raise ValueError(f"attention_decode: q has a head {ours}, the cache has {theirs}")
    if q.shape[1] % max(cache.shape[1], 1) or (q.shape[1] and not cache.shape[1]):
        raise ValueError(
            f"attention_decode: {q.shape[1]} heads of q are no multiple of the {cache.shape[1]} of the cache"
        )
    check_integers("attention_decode", "lengths", lengths, q.shape[0])
    check_extras("attention_decode", q.shape[1], sinks, window, softcap)
    return (torch.empty(q.transpose(1, 2).shape, dtype=q.dtype, device=q.device).transpose(1, 2),)


def reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None = None, sinks: Tensor | None = None,
    scale: float | None = None, window: int = 0, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention of the newest n tokens of each sequence over its cache, in float32, or float64 where q is.

    q: (B, Hq, n, D), any strides.  k, v: (B, Hkv, Lmax, D), any strides; with ``block_table`` (B, max_blocks) int32,
    (blocks, block_size, Hkv, D): key j of sequence b is row j % block_size of block block_table[b, j // block_size].
    ``lengths`` (B,): the keys of each sequence, those of the n tokens with them (outside [0, capacity]: the nearer
    end); nothing past them is read.  Query i stands at position p = lengths[b] - n + i and attends the keys j <= p,
    with ``window`` > 0 only those above p - window.  ``softcap`` > 0: scores become softcap tanh(score / softcap).
    ``sinks`` (Hq,): a logit more in each head's softmax.  ``scale``: D ** -0.5 where None.  A query with nothing to
    attend gives zeros.  A sequence's result depends on its own keys alone, to the bit: not on the batch, the capacity,
    the blocks' order or the threads."""
    (out,) = allocate(q, k, v, lengths, block_table, sinks, scale, window, softcap)
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    most, sinks = capacity(k, block_table), None if sinks is None else sinks.to(wide)
    for b, given in enumerate(lengths.tolist()):
        length = min(max(given, 0), most)
        keys, values = (gather(x, block_table, b, length).to(wide) for x in (k, v))
        out[b] = attend(q[b].to(wide), keys, values, True, sinks, scale, window, softcap)
    return out


def cost(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None = None, sinks: Tensor | None = None,
    scale: float | None = None, window: int = 0, softcap: float = 0.0,
) -> Cost:  # fmt: skip
    """As if every sequence were as long as its cache allows, or as the window lets it see: lengths are data."""
    batch, heads, n, dim = q.shape
    keys = capacity(k, block_table)
    keys = min(keys, window + n - 1) if window else keys
    kv = 2 * batch * cache_view(k, block_table).shape[1] * keys * dim * k.element_size()
    rows = q.numel() * q.element_size()
    return Cost(flops=4 * batch * heads * n * keys * dim, bytes=kv + 2 * rows, written=rows)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None, sinks: Tensor | None,
    scale: float | None, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """PyTorch's own attention under a mask; a paged cache is gathered first.  Sinks and soft caps it has none of."""
    if block_table is not None:
        k, v = (x[block_table.long()].flatten(1, 2).transpose(1, 2) for x in (k, v))
    n, keys = q.shape[2], torch.arange(k.shape[2], device=q.device)
    at = lengths[:, None] - n + torch.arange(n, device=q.device)
    keep = keys <= at[..., None]
    if window:
        keep &= keys > at[..., None] - window
    if sinks is not None or softcap:
        return spelled(q, k, v, keep[:, None], sinks, scale, softcap)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=keep[:, None], scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    q, k, v, lengths, table, *rest = args
    one = slice(b, b + 1)
    if table is None:
        return (q[one], k[one], v[one], lengths[one], None, *rest)
    return (q[one], k, v, lengths[one], table[one], *rest)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    batch, kv, share, n = draw.integer(0, 3), draw.integer(1, 2), draw.integer(1, 4), draw.integer(0, 9)
    most, dim, layouts = draw.integer(0, 60), draw.integer(1, 90), ("contiguous", "unaligned", "padded", "transposed")
    q = draw.tensor((batch, n, kv * share, dim), dtype, layouts=layouts).transpose(1, 2)
    table, shape = None, (batch, kv, most, dim)
    if draw.flag():
        block = draw.integer(1, 9)
        shape = (batch * (most // block) + 1, block, kv, dim)
        table = torch.randperm(shape[0], generator=draw.generator())[1:].to(torch.int32).view(batch, most // block)
    k, v = (draw.tensor(shape, dtype, layouts=layouts) for _ in range(2))
    lengths = torch.tensor([draw.integer(-1, most + 1) for _ in range(batch)], dtype=torch.int32)
    sinks = draw.maybe((kv * share,), (dtype, torch.float32))
    return (q, k, v, lengths, table, sinks, None, draw.choice((0, 1, 20)), draw.choice((0.0, 5.0)))


OP = register(
    Op(
        name="attention_decode",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={  # attention's
            torch.float32: Tolerance(rms=8e-6, peak=3e-5),
            torch.bfloat16: Tolerance(rms=4e-3, peak=8e-3),
            torch.float16: Tolerance(rms=5e-4, peak=1e-3),
        },
        cases=CASES,
        eager=_eager,
        alone=_alone,
        draw=_draw,
        formula="softmax(cap(scale q k^T), sinks) v over a key-value cache; cap(s) = softcap tanh(s / softcap)",
        source="Kwon et al. 2023, arXiv:2309.06180; Gemma 2, arXiv:2408.00118; gpt-oss, arXiv:2508.10925",
    )
)
