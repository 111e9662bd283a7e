"""A 3x3 convolution with padding 1 and a stride of 1 or 2 by packed taps, and what follows it:
y = conv2d(x, w) + bias + residual.

A session packs its weights once (:mod:`.conv_taps`).  Products are of bfloat16, their sums float32, in an order that is
a pixel's own: the same whatever the batch is.  :mod:`.winograd_conv2d` has fewer products of the same taps, and rounds
what it multiplies once more.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fusegen.kernels import conv_taps, linear
from fusegen.kernels.conv_taps import GROUP
from fusegen.kernels.draw import Draw, laid_out
from fusegen.kernels.op import Case, Cost, Op, is_channels_last, register

SCHEMA = "(Tensor x, Tensor taps, int outputs, Tensor? bias=None, Tensor? residual=None, int stride=1) -> Tensor"


def allocate(
    x: Tensor, taps: Tensor, outputs: int, bias: Tensor | None = None, residual: Tensor | None = None, stride: int = 1
) -> tuple[Tensor, ...]:
    """The uninitialised output (B, O, ceil(H / stride), ceil(W / stride)), O = ``outputs``, for x (B, I, H, W), taps
    (P, ceil(I / 2), 3, 3, 32, 2), bias (O,) in float32 or x's dtype, and a residual of the output's shape and x's
    dtype: x's dtype, channels-last where x is that and not also contiguous, else contiguous.

    Raises ValueError where they do not fit.
    """
    if stride not in (1, 2):
        raise ValueError(f"packed_conv2d: the stride is {stride}, neither 1 nor 2")
    if x.dim() != 4 or tuple(taps.shape) != (-(-outputs // GROUP), -(-x.shape[1] // 2), 3, 3, GROUP, 2):
        raise ValueError(
            f"packed_conv2d: x {tuple(x.shape)}, taps {tuple(taps.shape)} and {outputs} outputs are not (B, I, H, W), "
            "(P, ceil(I / 2), 3, 3, 32, 2), and at most 32 P"
        )
    if bias is not None and (tuple(bias.shape) != (outputs,) or bias.dtype not in (torch.float32, x.dtype)):
        raise ValueError(f"packed_conv2d: bias is {bias.dtype} {tuple(bias.shape)}, not {x.dtype} ({outputs},)")
    shape = (x.shape[0], outputs, -(-x.shape[2] // stride), -(-x.shape[3] // stride))
    if residual is not None and (tuple(residual.shape) != shape or residual.dtype != x.dtype):
        raise ValueError(f"packed_conv2d: residual is {residual.dtype} {tuple(residual.shape)}, not {x.dtype} {shape}")
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return (torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout),)


def reference(
    x: Tensor, taps: Tensor, outputs: int, bias: Tensor | None = None, residual: Tensor | None = None, stride: int = 1
) -> Tensor:
    """The convolution by the weight that the taps hold, in float32, or float64 where x is."""
    (out,) = allocate(x, taps, outputs, bias, residual, stride)
    if out.numel() == 0:
        return out
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros_like(out, dtype=wide)
    if x.shape[1]:  # PyTorch does not convolve nothing
        y = F.conv2d(x.to(wide), weight_of(taps, outputs, x.shape[1]).to(wide), stride=stride, padding=1)
    y = y if bias is None else y + bias.to(wide)[:, None, None]
    return out.copy_(y if residual is None else y + residual.to(wide))


def weight_of(taps: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight (O, I, 3, 3) that the taps hold."""
    return conv_taps.weight_of(taps, inputs)[:outputs]


def cost(
    x: Tensor, taps: Tensor, outputs: int, bias: Tensor | None = None, residual: Tensor | None = None, stride: int = 1
) -> Cost:
    """The products and sums; every argument read and the output written once."""
    written = x.shape[0] * outputs * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)
    read = sum(t.numel() * t.element_size() for t in (x, taps, bias, residual) if t is not None)
    return Cost(flops=18 * written * x.shape[1], bytes=read + written * x.element_size())


def _tail(g: Generator, x: Tensor, outputs: int, bias: str, residual: bool, stride: int) -> tuple[Any, ...]:
    """The arguments behind x: taps of a random weight, bias ("same" dtype as x, "fp32" or "no") and residual."""
    weight = torch.randn(outputs, x.shape[1], 3, 3, generator=g) / (9 * max(x.shape[1], 1)) ** 0.5
    offset = torch.randn(outputs, generator=g).to(torch.float32 if bias == "fp32" else x.dtype)
    more = torch.randn(x.shape[0], outputs, *(-(-n // stride) for n in x.shape[2:]), generator=g).to(x.dtype)
    more = more.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else more
    taps = conv_taps.reference(weight.to(x.dtype))
    return (taps, outputs, None if bias == "no" else offset, more if residual else None, stride)


def _case(
    name: str, shape: tuple[int, ...], outputs: int, *, layout: str = "channels_last", bias: str = "same",
    residual: bool = False, stride: int = 1, part: tuple[slice, ...] = (), bench: bool = False,
) -> Case:  # fmt: skip
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x = laid_out(torch.randn(shape, generator=g).to(dtype), layout)[part]
        if layout == "unaligned":  # and channels-last
            x = x.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
        return (x, *_tail(g, x, outputs, bias, residual, stride))

    return Case(name, build, dtypes=(torch.bfloat16,), bench=bench)


def _bench(*shape: int, outputs: int = 0, **more: Any) -> Case:
    outputs = outputs or shape[1]
    words = ["x".join(map(str, shape)), *([f"to {outputs}"] if outputs != shape[1] else [])]
    words += ["residual"] * more.get("residual", False) + ["stride 2"] * (more.get("stride") == 2)
    return _case(" ".join(words), shape, outputs, bench=True, **more)


CASES = [
    _case("small", (2, 5, 3, 4), 7),
    _case("one pixel", (2, 8, 1, 1), 16, residual=True),
    _case("one channel", (1, 1, 5, 3), 1),
    _case("one output", (1, 2, 5, 3), 1),
    _case("no batch", (0, 4, 3, 3), 4),
    _case("no pixels", (2, 4, 0, 3), 4),
    _case("no inputs", (2, 0, 3, 3), 4),
    _case("no outputs", (2, 4, 3, 3), 0),
    _case("one row", (1, 17, 1, 37), 19),
    _case("one column", (2, 17, 37, 1), 19),
    _case("prime sizes", (3, 37, 7, 11), 29, residual=True),
    _case("width 8", (2, 64, 8, 8), 64, residual=True),
    _case("width 4", (3, 32, 4, 4), 48),
    _case("width 5", (2, 40, 6, 5), 33),
    _case("width 17", (2, 34, 3, 17), 64, bias="fp32"),
    _case("width 33", (1, 66, 5, 33), 70),
    _case("bias in float32", (2, 32, 6, 6), 40, bias="fp32", residual=True),
    _case("no bias", (1, 16, 4, 4), 16, bias="no"),
    _case("no bias, residual", (1, 16, 4, 4), 32, bias="no", residual=True),
    _case("stride 2", (2, 32, 8, 8), 40, stride=2, residual=True),
    _case("stride 2, odd sizes", (2, 33, 7, 11), 37, stride=2),
    _case("stride 2, one pixel", (3, 16, 1, 1), 16, stride=2),
    _case("stride 2, to one pixel", (3, 16, 2, 2), 16, stride=2, residual=True),
    _case("stride 2, width 67", (1, 24, 5, 67), 64, stride=2, bias="fp32"),
    _case("many samples", (19, 20, 3, 3), 24, residual=True),
    _case("several blocks", (3, 67, 33, 19), 130, residual=True),
    _case("many inputs", (1, 521, 6, 7), 40),
    _case("more inputs", (2, 677, 3, 5), 33, residual=True),  # than tiles of AMX sum up at a time
    _case("contiguous", (2, 16, 6, 6), 16, layout="contiguous"),
    _case("strided", (2, 16, 3, 5), 16, layout="strided"),
    _case("unaligned", (2, 23, 5, 6), 35, layout="unaligned", residual=True),
    _case("samples of a batch", (4, 16, 5, 6), 24, part=(slice(1, 3),)),
    _case("channels of an image", (2, 40, 5, 6), 24, part=(slice(None), slice(3, 20))),
    _bench(2, 320, 64, 64),
    _bench(2, 640, 32, 32),
    _bench(2, 1280, 16, 16),
    _bench(2, 1280, 8, 8),
    _bench(2, 960, 64, 64, outputs=320, residual=True),
    _bench(2, 320, 64, 64, stride=2),
    _bench(1, 256, 256, 256),
    _bench(1, 512, 128, 128),
]


_plain: Any = WeakTensorKeyDictionary()  # taps -> the weight they hold, in oneDNN's form on a CPU


def _plain_weight(x: Tensor, taps: Tensor, outputs: int, stride: int) -> Tensor:
    """The weight as a user of PyTorch has it, made once: packed by oneDNN where it serves."""
    if taps not in _plain:
        weight = weight_of(taps, outputs, x.shape[1]).to(x.dtype).contiguous(memory_format=torch.channels_last)
        if x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() and outputs:
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
            weight = reorder(weight.to_mkldnn(), [1, 1], [stride] * 2, [1, 1], 1, list(x.shape))
        _plain[taps] = weight
    found: Tensor = _plain[taps]
    return found


def _eager(x: Tensor, taps: Tensor, outputs: int, bias: Any, residual: Any, stride: int) -> Tensor:
    weight, bias = _plain_weight(x, taps, outputs, stride), None if bias is None else bias.to(x.dtype)
    if not weight.is_mkldnn:
        y = F.conv2d(x, weight, bias, stride, 1)
        return y if residual is None else y + residual
    pointwise, where = torch.ops.mkldnn._convolution_pointwise, ([1, 1], [stride] * 2, [1, 1], 1)
    if residual is None:
        return pointwise(x, weight, bias, *where, "none", [], "")
    return pointwise.binary(x, residual, weight, bias, *where, "add", None, None, [], None)


def _alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    x, taps, outputs, bias, residual, stride = args
    return (x[b : b + 1], taps, outputs, bias, None if residual is None else residual[b : b + 1], stride)


def _draw(choices: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    shape = (*choices.shape(3, 40), *choices.shape(9, 19))
    x = choices.tensor(shape, dtype, layouts=("channels_last", "contiguous"))
    bias, residual = choices.choice(("same", "fp32", "no")), choices.flag()
    outputs, stride = choices.integer(0, 70), choices.choice((1, 2))
    return (x, *_tail(choices.generator(), x, outputs, bias, residual, stride))


OP = register(
    Op(
        name="packed_conv2d",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        # That of rounding the output once, as packed_linear's.
        tolerance={torch.bfloat16: linear.OP.tolerance[torch.bfloat16]},
        cases=CASES,
        eager=_eager,
        alone=_alone,
        draw=_draw,
        formula="conv2d(x, 3x3 w, stride 1 or 2, padding 1) + bias + residual, w in pairs of inputs",
        source="torch.nn.functional.conv2d",
    )
)
