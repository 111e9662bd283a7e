"""What the launchers of layer_norm.cpp, rms_norm.cpp and add_norm.cpp share; see row_norm.h."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.op import FLOATS
from fusegen.kernels.rows import rows_of, spread

_MODULATION = ("gate", "scale", "shift")
_SPREAD = ("x", "branch", *_MODULATION)  # what has x's shape, broadcast or not


class Args(ctypes.Structure):
    """``fg_row_norm_args`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "branch", "gate", "weight", "bias", "scale", "shift")),
        *((name, ctypes.c_void_p) for name in ("out", "sum")),
        *((name, ctypes.c_int64) for name in ("dtype", "weight_dtype", "bias_dtype", "modulation_dtype")),
        *((name, ctypes.c_int64) for name in ("outer", "inner", "width")),
        *((f"{name}_{side}", ctypes.c_int64) for name in _SPREAD for side in ("outer", "inner")),
        ("rms", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("eps", "offset")),
    ]


def _tensors(roles: Mapping[str, int], args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Role -> the argument, where there is one; what has x's shape as a view of that shape."""
    given = {name: args[i] for name, i in roles.items() if args[i] is not None}
    return {name: spread(t, given["x"]) if name in _SPREAD else t for name, t in given.items()}


def decline(roles: Mapping[str, int], args: tuple[Any, ...]) -> str | None:
    """``roles``: a field of the struct -> the position of the argument whose address it holds."""
    given = _tensors(roles, args)
    x = given["x"]
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    for name, tensor in given.items():
        if name != "branch" and tensor.dtype not in (x.dtype, torch.float32):
            return f"{name} is {tensor.dtype}, neither float32 nor x's {x.dtype}"
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name}'s last dimension is strided"
    if len({given[name].dtype for name in _MODULATION if name in given}) > 1:
        return "gate, scale and shift differ in dtype"
    if x.numel() and rows_of([t for name, t in given.items() if name in _SPREAD]) is None:
        return "the rows are not reached by two strides"
    return None


def bind(
    op: str,
    roles: Mapping[str, int],
    outs: tuple[Tensor, ...],
    args: tuple[Any, ...],
    eps: float,
    offset: float = 0.0,
    rms: bool = False,
) -> CpuLaunch:
    """The launch of ``op``; outs: the norm, and the sum where there is a branch."""
    given = _tensors(roles, args)
    x, views = given["x"], {name: t for name, t in given.items() if name in _SPREAD}
    modulation = next((given[name].dtype for name in _MODULATION if name in given), x.dtype)
    struct = Args(out=outs[0].data_ptr(), sum=outs[-1].data_ptr(), width=x.shape[-1], eps=eps, offset=offset, rms=rms)
    struct.dtype, struct.modulation_dtype = DTYPES[x.dtype], DTYPES[modulation]
    for name in ("weight", "bias"):
        setattr(struct, f"{name}_dtype", DTYPES[given[name].dtype] if name in given else 0)
    rows = rows_of(list(views.values())) if x.numel() else None
    if rows is not None:
        struct.outer, struct.inner = rows.outer, rows.inner
        for name, (outer, inner) in zip(views, rows.strides, strict=True):
            setattr(struct, f"{name}_outer", outer)
            setattr(struct, f"{name}_inner", inner)
    return CpuLaunch(op, struct, {i: name for name, i in roles.items()}, outs, args)
