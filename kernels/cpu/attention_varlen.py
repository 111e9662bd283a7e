"""The C++ kernel's launcher for packed sequences; see attention_varlen.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from fusegen.kernels.cpu.attention_decode import unserved
from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.op import Kernel

_INTEGERS = (
    "dtype", "sinks_dtype", "sequences", "queries", "keys", "heads", "kv_heads", "dim",
    "q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "out_row", "out_head",
    "cu_q_stride", "cu_k_stride", "sinks_stride", "causal", "window",
)  # fmt: skip


class Args(ctypes.Structure):
    """fg_attention_varlen_args of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "cu_q", "cu_k", "sinks", "out")),
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
    ]


class Launch(CpuLaunch):
    """Where the keys have the queries' offsets, both fields follow them."""

    def __init__(self, *bound: Any):
        super().__init__(*bound)
        self.shared = self.args[4] is None

    def move(self, index: int, tensor: Tensor) -> None:
        super().move(index, tensor)
        if index == 3 and self.shared:
            self.struct.cu_k = tensor.data_ptr()


def decline(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Any, sinks: Any, *rest: Any) -> str | None:
    """What the other attention kernels decline."""
    return unserved(q, k, v, sinks)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    """Fill the struct from shapes and strides."""
    q, k, v, cu_q, cu_k, sinks, causal, scale, window, softcap = args
    struct = Args(out=outs[0].data_ptr(), dtype=DTYPES[q.dtype], causal=bool(causal), window=window, softcap=softcap)
    struct.scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    struct.sequences, struct.keys, struct.kv_heads = cu_q.shape[0] - 1, k.shape[0], k.shape[1]
    struct.queries, struct.heads, struct.dim = q.shape
    for name, x in (("q", q), ("k", k), ("v", v), ("out", outs[0])):
        for axis, stride in zip(("row", "head"), x.stride(), strict=False):
            setattr(struct, f"{name}_{axis}", stride)
    keys = cu_q if cu_k is None else cu_k
    struct.cu_q_stride, struct.cu_k_stride, struct.cu_k = cu_q.stride(0), keys.stride(0), keys.data_ptr()
    if sinks is not None:
        struct.sinks_dtype, struct.sinks_stride = DTYPES[sinks.dtype], sinks.stride(0)
    return Launch("attention_varlen", struct, dict(enumerate(("q", "k", "v", "cu_q", "cu_k", "sinks"))), outs, args)


KERNELS = [Kernel("attention_varlen", "cpu", decline, bind)]
