"""Launcher of linear_panels.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.op import Kernel

_FULL, _HALF = torch.float32, torch.bfloat16
# The weight's dtype and the one asked for.
_SERVED = ((_FULL, _FULL), (_FULL, _HALF), (_HALF, _HALF), (_HALF, None), (torch.int8, torch.int8), (torch.int8, None))


class Args(ctypes.Structure):
    """``fg_linear_panels_args`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "gate", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "out_dtype", "outputs", "width")),
    ]


def decline(weight: Tensor, gate: Tensor | None, dtype: torch.dtype | None) -> str | None:
    if (weight.dtype, dtype) not in _SERVED:
        return f"weight is {weight.dtype}, the panels {dtype or f'{weight.dtype}, in pairs'}"
    return None if all(t is None or t.is_contiguous() for t in (weight, gate)) else "weight or gate is strided"


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    weight = args[0]
    struct = Args(
        out=outs[0].data_ptr(), dtype=DTYPES[weight.dtype], out_dtype=DTYPES[outs[0].dtype],
        outputs=weight.shape[0], width=weight.shape[1],
    )  # fmt: skip
    return CpuLaunch("linear_panels", struct, {0: "weight", 1: "gate"}, outs, args)


KERNELS = [Kernel("linear_panels C++", "cpu", decline, bind)]
