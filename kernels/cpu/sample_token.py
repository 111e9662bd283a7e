"""Launcher of sample_token.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels import sample_token as spec
from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.op import FLOATS, Kernel

_OUTS = ("token", "logprob", "top_tokens", "top_logprobs")


class Args(ctypes.Structure):
    """``fg_sample_token_args`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*spec.ARGUMENTS, *_OUTS)),
        *((name, ctypes.c_int64) for name in ("dtype", "mask_dtype")),
        *((name, ctypes.c_int64) for name in ("batch", "vocabulary", "length", "pairs", "top", "model")),
        *((name, ctypes.c_int64) for name in ("logits_row", "bias_row", "pairs_row", "mask_row")),
    ]


def decline(*args: Any) -> str | None:
    a = spec.Arguments(*args)
    if a.logits.dtype not in FLOATS:
        return f"logits is {a.logits.dtype}"
    if a.logits.shape[1] > 1 and a.logits.stride(1) != 1:
        return "the vocabulary is strided"
    for name in spec.ARGUMENTS[1:]:
        tensor = getattr(a, name)
        if tensor is not None and not tensor.is_contiguous():
            return f"{name} is strided"
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}, not float32"
    return None


def _stride(tensor: Tensor | None) -> int:
    return tensor.shape[1] if tensor is not None and tensor.dim() == 2 else 0


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    a = spec.Arguments(*args)
    struct = Args(
        **dict(zip(_OUTS, (out.data_ptr() for out in outs), strict=True)),
        dtype=DTYPES[a.logits.dtype],
        mask_dtype=0 if a.mask is None else DTYPES[a.mask.dtype],
        batch=a.logits.shape[0],
        vocabulary=a.logits.shape[1],
        length=0 if a.history is None else a.history.shape[1],
        pairs=0 if a.bias_ids is None else a.bias_ids.shape[-1],
        top=a.top,
        model=a.model,
        logits_row=a.logits.stride(0),
        bias_row=_stride(a.bias),
        pairs_row=_stride(a.bias_ids),
        mask_row=_stride(a.mask),
    )
    return CpuLaunch("sample_token", struct, dict(enumerate(spec.ARGUMENTS)), outs, args)


KERNELS = [Kernel("sample_token C++", "cpu", decline, bind)]
