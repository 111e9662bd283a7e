"""Launcher of noise_normal.cpp."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fusegen.kernels.cpu.library import CpuLaunch
from fusegen.kernels.noise_normal import TABLE
from fusegen.kernels.op import Kernel

_WORD = 2**32
COLUMNS = np.ascontiguousarray(TABLE.T)  # the C++ forms look up one coefficient for many octaves at once


class Args(ctypes.Structure):
    """``fg_noise_normal_args`` of abi.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("seeds", "out", "table")] + [
        (name, ctypes.c_int64) for name in ("batch", "count", "seeds_stride", "step", "sample")
    ]


def decline(seeds: Tensor, shape: Sequence[int], step: int, sample: int = 0) -> str | None:
    if math.prod(shape) > 4 * _WORD:
        return "a sample of more than 2^34 elements exhausts the counter"
    return None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    seeds, shape, step, sample = args
    struct = Args(
        out=outs[0].data_ptr(),
        table=COLUMNS.ctypes.data,
        batch=seeds.shape[0],
        count=math.prod(shape),
        seeds_stride=seeds.stride(0),
        step=step % _WORD,
        sample=sample % _WORD,
    )
    return CpuLaunch("noise_normal", struct, {0: "seeds"}, outs, args)


KERNELS = [Kernel("noise_normal C++", "cpu", decline, bind)]
