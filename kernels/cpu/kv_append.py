"""The launcher of kv_append.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.kv_cache import cache_view, capacity
from fusegen.kernels.op import Kernel

_POINTERS = ("k", "v", "positions", "table", "k_cache", "v_cache")
_INTEGERS = (
    "size", "positions_dtype", "batch", "heads", "rows", "dim", "blocks", "block", "most",
    *(f"{name}_{axis}" for name in "kv" for axis in ("batch", "head", "row", "dim")),
    *(f"{name}_cache_{axis}" for name in "kv" for axis in ("block", "head", "row", "dim")),
    "positions_stride", "table_batch", "table_block",
)  # fmt: skip


class Args(ctypes.Structure):
    """fg_kv_append_args of abi.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in _POINTERS] + [(name, ctypes.c_int64) for name in _INTEGERS]


def decline(*args: Any) -> str | None:
    """Nothing: any strides, and any element of whole bytes."""
    return None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    """Fill the struct from shapes and strides."""
    k, v, k_cache, v_cache, positions, table = args
    struct = Args(size=k.element_size(), positions_dtype=DTYPES[positions.dtype], positions_stride=positions.stride(0))
    struct.batch, struct.heads, struct.rows, struct.dim = k.shape
    caches = [cache_view(x, table) for x in (k_cache, v_cache)]
    struct.blocks, _, struct.block, _ = caches[0].shape
    struct.most = capacity(k_cache, table)
    for name, first, x in (
        ("k", "batch", k),
        ("v", "batch", v),
        ("k_cache", "block", caches[0]),
        ("v_cache", "block", caches[1]),
    ):
        for axis, stride in zip((first, "head", "row", "dim"), x.stride(), strict=True):
            setattr(struct, f"{name}_{axis}", stride)
    if table is not None:
        struct.table_batch, struct.table_block = table.stride()
    fields = dict(enumerate(("k", "v", "k_cache", "v_cache", "positions", "table")))
    return CpuLaunch("kv_append", struct, fields, outs, args)


KERNELS = [Kernel("kv_append", "cpu", decline, bind)]
