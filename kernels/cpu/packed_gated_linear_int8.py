"""Launcher of packed_gated_linear_int8.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from fusegen.kernels.cpu import packed_linear_int8
from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.cpu.packed_linear import PLACE
from fusegen.kernels.cpu.quantized import fields
from fusegen.kernels.op import Kernel

_POINTERS = {0: "x", 1: "panels", 2: "scale", 3: "gate_scale", 5: "bias", 6: "gate_bias"}


class Args(ctypes.Structure):
    """``fg_packed_gated_linear_int8_args`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_POINTERS.values(), "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "bias_dtype", "gate_bias_dtype", *PLACE)),
    ]


def decline(
    x: Tensor, panels: Tensor, scale: Tensor, gate_scale: Tensor, outputs: int, bias: Any, gate_bias: Any,
    activation: str,
) -> str | None:  # fmt: skip
    both = ((scale, bias), (gate_scale, gate_bias))
    reasons = (packed_linear_int8.decline(x, panels, s, outputs, b, None, activation) for s, b in both)
    return next((reason for reason in reasons if reason), None)


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, _, _, _, outputs, bias, gate_bias, activation = args
    dtype = 0 if gate_bias is None else DTYPES[gate_bias.dtype]
    struct = Args(out_features=outputs, gate_bias_dtype=dtype, **fields(x, outs[0], bias, activation))
    return CpuLaunch("packed_gated_linear_int8", struct, _POINTERS, outs, args)


KERNELS = [Kernel("packed_gated_linear_int8 C++", "cpu", decline, bind)]
