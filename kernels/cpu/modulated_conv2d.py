"""Launchers of modulated_conv2d.cpp: of the whole layer, and of what stands around a library's convolution."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fusegen.kernels import onednn
from fusegen.kernels.cpu.library import DTYPES, CpuLaunch
from fusegen.kernels.modulated_conv2d import Sizes, alone, finish, sizes
from fusegen.kernels.op import FLOATS, Kernel, Launch, is_channels_last

MOST_TAPS = 1024  # kMostTaps of modulated_conv2d.cpp
LEAST = 1 << 27  # multiply-adds of a sample below which the library's overheads show
WEIGHT = 1  # its argument
FEW = 24  # channels below which its convolutions are no faster
_SIZES = (
    "batch channels outputs height width taps_y taps_x up pad_y pad_x out_y out_x".split()
)  # as Sizes and the struct call them


class Args(ctypes.Structure):
    """``fg_modulated_conv2d_args`` of abi_images.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "styles", "noise", "bias", "out", "scaled", "product")),
        *((f"{name}dtype", ctypes.c_int64) for name in ("", "weight_", "styles_", "noise_", "bias_")),
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int64) for name in ("x_batch", "x_channel", "x_row", "x_col", "noise_batch")),
        *((name, ctypes.c_int64) for name in ("channels_last", "demodulate", "act")),
        *((name, ctypes.c_double) for name in ("alpha", "gain", "clamp", "eps")),
    ]


def decline(
    x: Tensor, weight: Tensor, styles: Tensor, noise: Tensor | None, bias: Tensor | None, *rest: Any
) -> str | None:
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if x.shape[3] > 1 and x.stride(3) != 1 and not is_channels_last(x):
        return "x's rows are strided"
    if weight.shape[2] * weight.shape[3] > MOST_TAPS:
        return f"a filter has {weight.shape[2] * weight.shape[3]} taps (limit {MOST_TAPS})"
    for name, tensor in (("weight", weight), ("styles", styles), ("noise", noise), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in (x.dtype, *FLOATS[:1]):
            return f"{name} is {tensor.dtype}, neither float32 nor x's {x.dtype}"
        if not tensor.is_contiguous():
            return f"{name} is strided"
    return None


def bind(outs: tuple[Tensor, ...], args: tuple[Any, ...]) -> CpuLaunch:
    x, weight, styles, noise, bias, demodulate, _, _, act, alpha, gain, clamp, eps = args
    s, found, last = sizes(*args[:8]), finish("modulated_conv2d", act, alpha, gain, clamp), is_channels_last(x)
    given = {"weight": weight, "styles": styles, "noise": noise, "bias": bias}
    struct = Args(
        out=outs[0].data_ptr(),
        dtype=DTYPES[x.dtype],
        x_batch=x.stride(0),
        x_channel=x.stride(1),
        x_row=x.stride(2),
        x_col=x.stride(3) if last else 1,
        noise_batch=0 if noise is None or noise.shape[0] == 1 else s.out_y,
        channels_last=is_channels_last(outs[0]),
        demodulate=demodulate,
        act=found.act,
        alpha=found.alpha,
        gain=found.gain,
        clamp=found.clamp,
        eps=eps,
        **{name: getattr(s, name) for name in _SIZES},
        **{f"{name}_dtype": 0 if t is None else DTYPES[t.dtype] for name, t in given.items()},
    )
    return CpuLaunch("modulated_conv2d", struct, dict(enumerate(("x", *given))), outs, args)


class ThroughLibrary(Launch):
    """Sample by sample, so that none depends on its batch: the input scaled, oneDNN's convolution, and what follows it.

    The weights are laid out for oneDNN at every run, since they may have been written, as eager PyTorch does it too;
    those that are kept are laid out once.
    """

    def __init__(self, outs: tuple[Tensor, ...], args: tuple[Any, ...]):
        self.args, self.size = list(args), sizes(*args[:8])
        own = [(outs[0][b : b + 1], alone(args, b)) for b in range(self.size.batch)]
        self.before, self.after = ([bind((out,), of) for out, of in own] for _ in range(2))
        self.kept = False
        self.packed: Tensor | None = None

    def keep(self, index: int) -> None:
        self.kept |= index == WEIGHT

    def run(self) -> None:
        x, weight, s = self.args[0], self.args[1], self.size
        shape = (1, s.channels, s.height, s.width)
        scaled = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        packed = _packed(weight.to(x.dtype), s, shape) if self.packed is None else self.packed
        self.packed = packed if self.kept else None
        for before, after in zip(self.before, self.after, strict=True):
            before.struct.scaled = scaled.data_ptr()
            before.run()
            product = _convolved(scaled, packed, s)
            after.struct.product = product.data_ptr()
            after.run()

    def move(self, index: int, tensor: Tensor) -> None:
        self.args[index] = tensor
        self.packed = None if index == WEIGHT else self.packed
        for b, launches in enumerate(zip(self.before, self.after, strict=True)):
            for launch in launches:
                launch.move(index, alone(tuple(self.args), b)[index])


def _packed(weight: Tensor, s: Sizes, shape: tuple[int, ...]) -> Tensor:
    """Weights (O, I, ky, kx) in oneDNN's own layout, for inputs of ``shape``."""
    padding = [s.pad_y, s.pad_x]
    if s.up == 1:
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        return reorder(weight.to_mkldnn(), padding, [1, 1], [1, 1], 1, list(shape))
    reorder = torch.ops.mkldnn._reorder_convolution_transpose_weight
    return reorder(weight.transpose(0, 1), padding, [0, 0], [s.up, s.up], [1, 1], 1, list(shape))


def _convolved(x: Tensor, packed: Tensor, s: Sizes) -> Tensor:
    """The convolution, or transposed one, of x (1, I, H, W), channels-last."""
    padding = [s.pad_y, s.pad_x]
    if s.up == 1:
        y = torch.ops.mkldnn._convolution_pointwise(x, packed, None, padding, [1, 1], [1, 1], 1, "none", [], "")
    else:
        up = [s.up, s.up]
        y = torch.ops.mkldnn._convolution_transpose_pointwise(
            x, packed, None, padding, [0, 0], up, [1, 1], 1, "none", [], ""
        )
    return y.contiguous(memory_format=torch.channels_last)


def decline_library(*args: Any) -> str | None:
    x, s = args[0], sizes(*args[:8])
    if reason := decline(*args[:5]):
        return reason
    if not torch.backends.mkldnn.is_available():
        return "PyTorch was built without oneDNN"
    if x.dtype == torch.float16:
        return "oneDNN has no fast float16 on every CPU"
    if not onednn.serves(x.dtype):
        return "oneDNN has no bfloat16 products here"  # in float32 they are no faster than ours (Zen 3)
    work = s.channels * s.outputs * s.taps_y * s.taps_x * s.height * s.width
    if work < LEAST or min(s.channels, s.outputs) < FEW:
        return "the convolution is too small to be worth a library's call"
    return None


KERNELS = [
    Kernel("modulated_conv2d C++", "cpu", decline, bind),
    Kernel("modulated_conv2d oneDNN", "cpu", decline_library, ThroughLibrary, rank=1),
]
