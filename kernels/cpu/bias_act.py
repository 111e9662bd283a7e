"""Launcher of bias_act.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from fusegen.kernels.bias_act import finish, folded
from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.op import FLOATS, Kernel


class Args(ctypes.Structure):
    """``fg_bias_act_args`` of abi_images.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("dtype", "bias_dtype", "outer", "channels", "inner")),
        *((name, ctypes.c_int64) for name in ("x_outer", "x_channel", "act")),
        *((name, ctypes.c_double) for name in ("alpha", "gain", "clamp")),
    ]


def decline(x: Tensor, bias: Tensor | None, dim: int, *rest: Any) -> str | None:
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if bias is not None and (bias.dtype not in FLOATS or not bias.is_contiguous()):
        return f"bias is strided or {bias.dtype}"
    if not x.numel():
        return None
    view = folded(x, bias, dim)
    if view is None:
        return f"x of strides {tuple(x.stride())} is not reached by three strides"
    innermost = view.strides[2] if view.sizes[2] > 1 else view.strides[1] if view.sizes[1] > 1 else 1
    return None if innermost == 1 else "x's innermost dimension is strided"


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, bias, dim, *rest = args
    view, found = folded(x, bias, dim) if x.numel() else None, finish("bias_act", *rest)
    outer, channels, inner = view.sizes if view else (0, 0, 0)
    x_outer, x_channel, _ = view.strides if view else (0, 0, 0)
    struct = Args(
        out=outs[0].data_ptr(),
        dtype=DTYPES[x.dtype],
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        outer=outer,
        channels=channels,
        inner=inner,
        x_outer=x_outer,
        x_channel=x_channel,
        act=found.act,
        alpha=found.alpha,
        gain=found.gain,
        clamp=found.clamp,
    )
    return CpuLaunch("bias_act", struct, {0: "x", 1: "bias"}, outs, args)


class InPlace:
    """The activation ``act`` alone, written over dense tensors of one shape, layout and dtype."""

    def __init__(self, act: str):
        self.act = act
        self.launch: CpuLaunch | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x, overwritten; the first call binds the kernel."""
        if self.launch is None:
            self.launch = bind((x,), (x, None, 1, self.act, None, None, None))
            self.launch.outs, self.launch.args = (), []  # it keeps no tensor alive
        self.launch.struct.x = self.launch.struct.out = x.data_ptr()
        self.launch.run()
        return x


KERNELS = [Kernel("bias_act C++", "cpu", decline, bind)]
