"""Launcher of conv_taps_int8.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from fusegen.kernels.cpu.library import CpuLaunch
from fusegen.kernels.op import Kernel


class Args(ctypes.Structure):
    """``fg_conv_taps_int8_args`` of abi_images.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "taps", "sums")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs")),
    ]


def decline(weight: Tensor) -> str | None:
    return None if weight.is_contiguous() else "weight is strided"


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    outputs, inputs = args[0].shape[:2]
    taps, sums = (t.data_ptr() for t in outs)
    return CpuLaunch(
        "conv_taps_int8", Args(taps=taps, sums=sums, inputs=inputs, outputs=outputs), {0: "weight"}, outs, args
    )


KERNELS = [Kernel("conv_taps_int8 C++", "cpu", decline, bind)]
