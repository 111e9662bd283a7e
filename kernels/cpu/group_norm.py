"""Launcher of group_norm.cpp, and what it shares with that of join_group_norm.cpp."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.op import FLOATS, Kernel, is_last

_PARAMETERS = ("weight", "bias")
_PER_SAMPLE = ("add", "scale", "shift")
ROLES = {"x": 0, "weight": 2, "bias": 3, "add": 6, "scale": 7, "shift": 8, "moments": 9}


class Args(ctypes.Structure):
    """``fg_group_norm_args`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "other", "joined", *_PARAMETERS, *_PER_SAMPLE, "moments", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", *(f"{n}_dtype" for n in (*_PARAMETERS, *_PER_SAMPLE)))),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "groups", "pixels", "split", "concat")),
        *((f"{name}_batch", ctypes.c_int64) for name in ("x", "other", *_PER_SAMPLE)),
        *((name, ctypes.c_int64) for name in ("channels_last", "silu")),
        ("eps", ctypes.c_double),
    ]


def dense_samples(x: Tensor) -> bool:
    """Whether each sample is contiguous; samples may lie apart."""
    return x.numel() == 0 or x[0].is_contiguous()


def unfit(x: Tensor, roles: Mapping[str, int], args: tuple[Any, ...]) -> str | None:
    """Why the struct cannot hold x or the tensors beside it."""
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if not is_last(x) and not dense_samples(x):
        return "x's samples are neither contiguous nor channels-last"
    if args[roles["moments"]] is not None and not args[roles["moments"]].is_contiguous():
        return "moments are strided"
    for name, tensor in ((n, args[i]) for n, i in roles.items() if n in (*_PARAMETERS, *_PER_SAMPLE)):
        if tensor is None:
            continue
        if tensor.dtype not in (x.dtype, torch.float32):
            return f"{name} is {tensor.dtype}, neither float32 nor x's {x.dtype}"
        if tensor.stride(0 if name in _PARAMETERS else 1) != 1 and tensor.numel() > 1:
            return f"{name} is strided"
    return None


def fill(out: Tensor, roles: Mapping[str, int], args: tuple[Any, ...], groups: int, eps: float, silu: bool) -> Args:
    """The struct without what is joined; out gives the channels."""
    x = args[roles["x"]]
    struct = Args(out=out.data_ptr(), dtype=DTYPES[x.dtype], groups=groups, eps=eps, silu=silu)
    struct.batch, struct.channels, struct.pixels = out.shape[0], out.shape[1], math.prod(out.shape[2:])
    struct.x_batch, struct.split, struct.channels_last = x.stride(0), x.shape[1], is_last(out)
    for name in (n for n in (*_PARAMETERS, *_PER_SAMPLE) if n in roles and args[roles[n]] is not None):
        tensor = args[roles[name]]
        setattr(struct, f"{name}_dtype", DTYPES[tensor.dtype])
        if name in _PER_SAMPLE:
            setattr(struct, f"{name}_batch", tensor.stride(0) if tensor.shape[0] > 1 else 0)
    return struct


def decline(*args: Any) -> str | None:
    return unfit(args[0], ROLES, args)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    struct = fill(outs[0], ROLES, args, args[1], args[4], args[5] == "silu")
    return CpuLaunch("group_norm", struct, {i: name for name, i in ROLES.items()}, outs, args)


KERNELS = [Kernel("group_norm C++", "cpu", decline, bind)]
