"""Launcher of packed_gated_linear.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from fusegen.kernels.cpu import packed_linear
from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.cpu.quantized import fields
from fusegen.kernels.op import Kernel


class Args(ctypes.Structure):
    """``fg_packed_gated_linear_args`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "panels", "bias", "gate_bias", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "bias_dtype", "gate_bias_dtype", *packed_linear.PLACE)),
    ]


def decline(x: Tensor, panels: Tensor, outputs: int, bias: Any, gate_bias: Any, activation: str) -> str | None:
    reasons = (packed_linear.decline(x, panels, outputs, b, None, activation) for b in (bias, gate_bias))
    return next((reason for reason in reasons if reason), None)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, _, outputs, bias, gate_bias, activation = args
    dtype = 0 if gate_bias is None else DTYPES[gate_bias.dtype]
    struct = Args(out_features=outputs, gate_bias_dtype=dtype, **fields(x, outs[0], bias, activation))
    return CpuLaunch("packed_gated_linear", struct, {0: "x", 1: "panels", 3: "bias", 4: "gate_bias"}, outs, args)


KERNELS = [Kernel("packed_gated_linear C++", "cpu", decline, bind)]
