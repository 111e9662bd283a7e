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
from fusegen.kernels.op import Cost, Op, Tolerance, register

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor? block_table=None, Tensor? sinks=None, float? scale=None,"
    " int window=0, float softcap=0.0) -> Tensor"
)


def cache_view(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """A cache as (blocks, Hkv, block_size, D): a contiguous one has a block a sequence.  A view."""
    return cache if block_table is None else cache.transpose(1, 2)


def capacity(cache: Tensor, block_table: Tensor | None) -> int:
    """The most keys that a sequence can have."""
    return cache.shape[2] if block_table is None else block_table.shape[1] * cache.shape[1]


def check_cache(name: str, k: Tensor, v: Tensor, batch: int, block_table: Tensor | None) -> None:
    """Raises ValueError, one line, where the caches and the table do not fit together or the batch."""
    if k.dim() != 4 or v.shape != k.shape or v.dtype != k.dtype:
        wanted = "(B, Hkv, Lmax, D)" if block_table is None else "(blocks, block_size, Hkv, D)"
        raise ValueError(f"{name}: k {tuple(k.shape)} and v {tuple(v.shape)} are not both {wanted} of one dtype")
    if block_table is None:
        if k.shape[0] != batch:
            raise ValueError(f"{name}: a cache of {k.shape[0]} sequences for a batch of {batch}")
    elif block_table.dim() != 2 or block_table.shape[0] != batch or block_table.dtype != torch.int32:
        raise ValueError(f"{name}: block_table {tuple(block_table.shape)} is not ({batch}, max_blocks) of int32")


def check_integers(name: str, what: str, x: Tensor, batch: int) -> None:
    """Raises ValueError where ``x`` is not one integer a sequence."""
    if tuple(x.shape) != (batch,) or x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: {what} is not ({batch},) of int32 or int64")


def check_extras(name: str, heads: int, sinks: Tensor | None, window: int, softcap: float) -> None:
    """Raises ValueError where sinks are not a logit a head, or the window or the cap is negative."""
    if sinks is not None and (tuple(sinks.shape) != (heads,) or not sinks.dtype.is_floating_point):
        raise ValueError(f"{name}: sinks {tuple(sinks.shape)} are not ({heads},) floats, one a head")
    if window < 0 or not softcap >= 0.0:
        raise ValueError(f"{name}: window {window} and softcap {softcap} must be 0 (none) or positive")


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


def gather(cache: Tensor, table: Tensor | None, b: int, length: int) -> Tensor:
    """The first ``length`` rows of sequence ``b``: (Hkv, length, D)."""
    if table is None:
        return cache[b, :, :length]
    size = cache.shape[1]
    blocks = table[b, : -(-length // size) if size else 0].long()
    return cache[blocks].flatten(0, 1)[:length].transpose(0, 1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, sinks: Tensor | None, scale: float, window: int, softcap: float,
    behind: int = 0,
) -> Tensor:  # fmt: skip
    """One sequence: q (Hq, n, D), k and v (Hkv, L, D), all wide -> (Hq, n, D).  The last query stands ``behind`` keys
    before the last key.

    Weights are softmax(cap(scale q k^T)) over the open keys and, where there are sinks, one more logit, which has no
    value.  ``cap(s)`` is softcap tanh(s / softcap).  A query with nothing to attend gives zeros.
    """
    share = q.shape[0] // max(k.shape[0], 1)
    k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    n, length = scores.shape[1:]
    at = torch.arange(n, device=q.device)[:, None] + (length - n - behind)
    key = torch.arange(length, device=q.device)
    if causal:
        scores = scores.masked_fill(key > at, -torch.inf)
    if window:
        scores = scores.masked_fill((key <= at - window) | (key >= at + window), -torch.inf)
    extra = q.new_full((q.shape[0], n, 1), -torch.inf)
    if sinks is not None:
        extra = extra.copy_(sinks[:, None, None])
    full = torch.cat([scores, extra], -1)
    top = full.amax(-1, keepdim=True)
    weights = torch.exp(full - top.masked_fill(top == -torch.inf, 0))
    total = weights.sum(-1, keepdim=True)
    return weights[..., :-1] / total.masked_fill(total == 0, 1) @ v


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
    return Cost(flops=4 * batch * heads * n * keys * dim, bytes=kv + 2 * q.numel() * q.element_size())


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


def spelled(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, sinks: Tensor | None, scale: float | None, softcap: float
) -> Tensor:
    """The eager form of models with sinks or a soft cap."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~keep, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]] @ v


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
        source="Flash-Decoding 2023; Kwon et al. 2023, arXiv:2309.06180; Gemma 2, arXiv:2408.00118; gpt-oss, arXiv:2508.10925",
    )
)
