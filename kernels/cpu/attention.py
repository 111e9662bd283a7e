"""The C++ attention kernel's launcher; see attention.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from fusegen.kernels.attention import heads, spread_mask
from fusegen.kernels.cpu import library
from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.op import FLOATS, Kernel, Launch

MOST_DIM = 1024  # as in attention_chunk.h
_POINTERS = ("q", "k", "v", "mask", "key_lengths", "out")
_INTEGERS = (
    "dtype", "mask_dtype", "lengths_dtype", "batch", "heads", "kv_heads", "queries", "keys", "dim",
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row",
    "out_batch", "out_head", "out_row", "mask_batch", "mask_head", "mask_row", "mask_key", "lengths_stride", "causal",
)  # fmt: skip


class Args(ctypes.Structure):
    """fg_attention_args of abi.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS]
        + [(name, ctypes.c_int64) for name in _INTEGERS]
        + [("scale", ctypes.c_double)]
    )


def decline(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, key_lengths: Tensor | None = None,
    causal: bool = False, scale: float | None = None,
) -> str | None:  # fmt: skip
    """The reason this kernel cannot serve these arguments, or None."""
    if q.dtype not in FLOATS:
        return f"dtype {q.dtype}"
    if q.shape[-1] > MOST_DIM:
        return f"head dimension {q.shape[-1]}: over {MOST_DIM}"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            return f"{name} has stride {x.stride(-1)} along the head dimension: it must be 1"
    if mask is not None and mask.dtype not in (*FLOATS, library.torch.bool):
        return f"mask of dtype {mask.dtype}"
    return None


def plain_struct(out: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Args:
    """The struct of q, k and v alone, from their shapes and strides."""
    struct = Args(out=out.data_ptr(), dtype=DTYPES[q.dtype])
    struct.scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    struct.batch, struct.heads, struct.queries, struct.dim = heads(q).shape
    _, struct.kv_heads, struct.keys, _ = heads(k).shape
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        for axis, stride in zip(("batch", "head", "row"), heads(x).stride(), strict=False):
            setattr(struct, f"{name}_{axis}", stride)
    return struct


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> Launch:
    """Fill the struct from shapes and strides."""
    q, k, v, mask, key_lengths, causal, scale = args
    struct = plain_struct(outs[0], q, k, v, scale)
    struct.causal = bool(causal)
    if mask is not None:
        struct.mask_dtype = DTYPES[mask.dtype]
        struct.mask_batch, struct.mask_head, struct.mask_row, struct.mask_key = spread_mask(mask, q, k).stride()
    if key_lengths is not None:
        struct.lengths_dtype, struct.lengths_stride = DTYPES[key_lengths.dtype], key_lengths.stride(0)
    return CpuLaunch("attention", struct, dict(enumerate(_POINTERS[:5])), outs, args)


KERNELS = [Kernel("attention", "cpu", decline, bind)]
