"""Launcher of linear_panels.cpp for taps: panels of the weight's rows, its 9 I taps taken as columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.cpu.linear_panels import Args as Args
from fusegen.kernels.op import Kernel


def decline(weight: Tensor) -> str | None:
    if weight.dtype != torch.float32:
        return f"weight is {weight.dtype}"
    return None if weight.is_contiguous() else "weight is strided"


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    (weight,) = args
    dtype = DTYPES[torch.float32]
    struct = Args(
        out=outs[0].data_ptr(), dtype=dtype, out_dtype=dtype, outputs=weight.shape[0], width=9 * weight.shape[1]
    )  # fmt: skip
    return CpuLaunch("linear_panels", struct, {0: "weight"}, outs, args)


KERNELS = [Kernel("winograd_taps C++", "cpu", decline, bind)]
