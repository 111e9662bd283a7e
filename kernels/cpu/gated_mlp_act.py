"""Launcher of gated_mlp_act.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.gated_mlp_act import ACTIVATIONS, check, loops
from fusegen.kernels.op import FLOATS, Kernel


class Args(ctypes.Structure):
    """``fg_gated_mlp_act_args`` of abi.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "up", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "activation", "n0", "n1", "n2", "width")),
        *((name, ctypes.c_int64) for name in ("gate_0", "gate_1", "gate_2", "gate_start")),
        *((name, ctypes.c_int64) for name in ("up_0", "up_1", "up_2", "up_start")),
    ]


def decline(x: Tensor, up: Tensor | None, activation: str, gate_first: bool) -> str | None:
    check(x, up, activation)
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if not x.numel():
        return None
    found = loops(x, up, gate_first)
    if found is None:
        return f"x's strides {tuple(x.stride())} take more than four loops"
    if found[0][-1] > 1 and any(steps[-1] != 1 for steps in found[1]):
        return "what is neighbours in the output is not in gate or up"
    return None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, up, activation, gate_first = args
    found = loops(x, up, gate_first) if x.numel() else None
    (n0, n1, n2, width), (_, gates, ups) = found or ((0,) * 4, [(0,) * 4] * 3)
    half = 0 if up is not None or not x.numel() else x.shape[-1] // 2 * x.stride(-1)
    struct = Args(
        out=outs[0].data_ptr(),
        dtype=DTYPES[x.dtype],
        activation=tuple(ACTIVATIONS).index(activation),
        n0=n0,
        n1=n1,
        n2=n2,
        width=width,
        gate_0=gates[0],
        gate_1=gates[1],
        gate_2=gates[2],
        gate_start=0 if gate_first else half,
        up_0=ups[0],
        up_1=ups[1],
        up_2=ups[2],
        up_start=half if gate_first else 0,
    )
    return CpuLaunch("gated_mlp_act", struct, {0: "x", 1: "up"}, outs, args)


KERNELS = [Kernel("gated_mlp_act C++", "cpu", decline, bind)]
