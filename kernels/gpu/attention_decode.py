"""Decoding attention on NVIDIA GPUs: the kernel that splits a sequence's keys among programs, over a cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.gpu import attention_split
from fusegen.kernels.gpu.attention_split import Config
from fusegen.kernels.gpu.launch import SHORT, Named, Stage, meta, power
from fusegen.kernels.gpu.tune import Tunable
from fusegen.kernels.kv_cache import cache_view
from fusegen.kernels.op import FLOATS, Kernel

PLACES = {"q": 0, "k": 1, "v": 2, "lengths": 3, "table": 4, "sinks": 5}  # positions of the tensors in the schema
WIDEST = 256  # the largest head dimension


def _rule(q: Tensor, k: Tensor, table: Tensor | None) -> tuple[int, int, torch.dtype, bool]:
    """Head dimension, queries over a key head, dtype and whether the cache is paged: what a configuration depends on,
    not the batch nor the capacity, on which no bit may depend."""
    rows = q.shape[1] // max(1, cache_view(k, table).shape[1]) * q.shape[2]
    return q.shape[-1], rows, q.dtype, table is not None


def key(q: Tensor, k: Tensor, v: Tensor, lengths: Any, table: Any, *rest: Any) -> str:
    """Head dimension, queries over a key head to the next power of two, dtype and whether the cache is paged."""
    dim, rows, dtype, paged = _rule(q, k, table)
    return f"{'paged ' * paged}{dim} {min(power(rows), 64)} {str(dtype).removeprefix('torch.')}"


def default(q: Tensor, k: Tensor, v: Tensor, lengths: Any, table: Any, *rest: Any, limit: int = 0) -> Config:
    """That of the split."""
    return attention_split.default(*_rule(q, k, table))


def space(q: Tensor, k: Tensor, v: Tensor, lengths: Any, table: Any, *rest: Any) -> Iterator[Config]:
    """That of the split."""
    yield from attention_split.space(*_rule(q, k, table))


def stages(outs: tuple[Tensor, ...], args: tuple[Any, ...], config: Config) -> tuple[Stage, ...]:
    """One launch."""
    q, k, v, _, table, _, scale, window, softcap = args
    places = {name: at for name, at in PLACES.items() if args[at] is not None}
    return attention_split.stages(
        outs[0], q, k, v, config, places, causal=True, table=table, scale=scale, window=window, softcap=softcap
    )


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
