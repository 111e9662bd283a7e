"""The C++ decoding kernel's launcher; see attention_decode.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.kv_cache import cache_view, capacity
from fusegen.kernels.op import FLOATS, Kernel

_INTEGERS = (
    "dtype", "lengths_dtype", "sinks_dtype", "batch", "heads", "kv_heads", "queries", "dim", "blocks", "block", "most",
    "q_batch", "q_head", "q_row", "k_block", "k_head", "k_row", "v_block", "v_head", "v_row",
    "out_batch", "out_head", "out_row", "table_batch", "table_block", "lengths_stride", "sinks_stride", "window",
)  # fmt: skip


class Args(ctypes.Structure):
    """fg_attention_decode_args of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "lengths", "table", "sinks", "out")),
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
    ]


def unserved(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> str | None:
    """The reason the C++ attention kernels cannot serve these tensors, or None."""
    if q.dtype not in FLOATS:
        return f"dtype {q.dtype}"
    if q.shape[-1] > 256:
        return f"head dimension {q.shape[-1]}: over 256"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            return f"{name} has stride {x.stride(-1)} along the head dimension: it must be 1"
    if sinks is not None and sinks.dtype not in FLOATS:
        return f"sinks of dtype {sinks.dtype}"
    return None


def decline(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Any, sinks: Any, *rest: Any) -> str | None:
    """See :func:`unserved`."""
    return unserved(q, k, v, sinks)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    """Fill the struct from shapes and strides."""
    q, k, v, lengths, table, sinks, scale, window, softcap = args
    struct = Args(out=outs[0].data_ptr(), dtype=DTYPES[q.dtype], window=window, softcap=softcap)
    struct.scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    struct.batch, struct.heads, struct.queries, struct.dim = q.shape
    struct.lengths_dtype, struct.lengths_stride = DTYPES[lengths.dtype], lengths.stride(0)
    caches = [cache_view(x, table) for x in (k, v)]
    struct.blocks, struct.kv_heads, struct.block, _ = caches[0].shape
    struct.most = capacity(k, table)
    for name, first, x in (
        ("q", "batch", q),
        ("k", "block", caches[0]),
        ("v", "block", caches[1]),
        ("out", "batch", outs[0]),
    ):
        for axis, stride in zip((first, "head", "row"), x.stride(), strict=False):
            setattr(struct, f"{name}_{axis}", stride)
    if table is not None:
        struct.table_batch, struct.table_block = table.stride()
    if sinks is not None:
        struct.sinks_dtype, struct.sinks_stride = DTYPES[sinks.dtype], sinks.stride(0)
    return CpuLaunch(
        "attention_decode", struct, dict(enumerate(("q", "k", "v", "lengths", "table", "sinks"))), outs, args
    )


KERNELS = [Kernel("attention_decode", "cpu", decline, bind)]
