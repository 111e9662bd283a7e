"""What the ops over a key-value cache share: its layouts, checks of their arguments, and one sequence's attention."""

from __future__ import annotations

import torch
from torch import Tensor


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
