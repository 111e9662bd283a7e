"""A 3x3 convolution with padding 1 in int8 by packed taps, of stride 1 or 2 or of a nearest 2x upsampling:
y = conv2d(x, w) + bias + residual.

A session packs its weights once (:mod:`.conv_taps_int8`).  x is quantized on the way, as :mod:`.conv2d_int8` has it: a
scale and a zero point for each sample, found first; sums are exact integers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels import conv_taps_int8, quantize_uint8, winograd_conv2d_int8
from fusegen.kernels.conv2d_int8 import LONGEST
from fusegen.kernels.conv_taps import GROUP
from fusegen.kernels.conv_taps_int8 import CHUNK, WORD
from fusegen.kernels.draw import Draw
from fusegen.kernels.op import FLOATS, Case, Cost, Op, is_channels_last, register
from fusegen.kernels.winograd_conv2d import larger
from fusegen.kernels.winograd_int8_filters import random_weight

SCHEMA = (
    "(Tensor x, Tensor taps, Tensor sums, Tensor scale, int outputs, Tensor? bias=None, Tensor? residual=None,"
    " int stride=1, bool doubled=False) -> Tensor"
)


def output_shape(x: Tensor, outputs: int, stride: int, doubled: bool) -> tuple[int, ...]:
    """(B, O, H', W') of the convolution."""
    times = 2 if doubled else 1
    return (x.shape[0], outputs, *(-(-n * times // stride) for n in x.shape[2:]))


def allocate(
    x: Tensor, taps: Tensor, sums: Tensor, scale: Tensor, outputs: int, bias: Tensor | None = None,
    residual: Tensor | None = None, stride: int = 1, doubled: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised output (B, O, ceil(H / stride), ceil(W / stride)), or (B, O, 2 H, 2 W) where x is ``doubled``,
    for x (B, I, H, W), taps (P, ceil(I / 64), 3, 3, 16, 32, 4) int8, sums (P, 32) int32, scale (O,), bias (O,) in
    float32 or x's dtype and a residual of the output's shape and x's dtype: channels-last where x is that and not also
    contiguous, else contiguous.

    Raises ValueError where they do not fit.
    """
    if stride not in (1, 2) or (doubled and stride != 1):
        raise ValueError(f"packed_conv2d_int8: the stride is {stride}, neither 1 nor, of what is not doubled, 2")
    groups = -(-outputs // GROUP)
    fits = x.dim() == 4 and taps.dtype == torch.int8 and sums.dtype == torch.int32
    laid = (groups, -(-x.shape[1] // CHUNK), 3, 3, CHUNK // WORD, GROUP, WORD)
    if not fits or tuple(taps.shape) != laid or tuple(sums.shape) != (groups, GROUP):
        raise ValueError(
            f"packed_conv2d_int8: x {tuple(x.shape)}, taps {taps.dtype} {tuple(taps.shape)}, sums {sums.dtype} "
            f"{tuple(sums.shape)} and {outputs} outputs are not (B, I, H, W), int8 (P, ceil(I / 64), 3, 3, 16, 32, 4), "
            "int32 (P, 32) and at most 32 P"
        )
    if 9 * x.shape[1] > LONGEST:
        raise ValueError(f"packed_conv2d_int8: {9 * x.shape[1]} products a sum are more than {LONGEST}")
    if tuple(scale.shape) != (outputs,) or (bias is not None and tuple(bias.shape) != (outputs,)):
        raise ValueError(f"packed_conv2d_int8: scale or bias does not have one value for each of {outputs} channels")
    if bias is not None and bias.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"packed_conv2d_int8: bias is {bias.dtype}, neither float32 nor x's {x.dtype}")
    shape = output_shape(x, outputs, stride, doubled)
    if residual is not None and (tuple(residual.shape) != shape or residual.dtype != x.dtype):
        raise ValueError(
            f"packed_conv2d_int8: residual is {residual.dtype} {tuple(residual.shape)}, not {x.dtype} {shape}"
        )
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return (torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout),)


def reference(
    x: Tensor, taps: Tensor, sums: Tensor, scale: Tensor, outputs: int, bias: Tensor | None = None,
    residual: Tensor | None = None, stride: int = 1, doubled: bool = False,
) -> Tensor:  # fmt: skip
    """The integers are exact, in float64; the rest float32, or float64 as x."""
    (out,) = allocate(x, taps, sums, scale, outputs, bias, residual, stride, doubled)
    if not out.numel():
        return out
    wide = torch.promote_types(x.dtype, torch.float32)
    codes, scales, zeros = quantize_uint8.reference(x)
    centred = larger(codes.double() - zeros[:, None, None, None], doubled)
    made = out.double().zero_()
    if x.shape[1]:  # PyTorch does not convolve nothing
        weight = conv_taps_int8.weight_of(taps, outputs, x.shape[1])
        made = F.conv2d(centred, weight.double(), stride=stride, padding=1)
    y = made.to(wide) * scales.to(wide)[:, None, None, None] * scale.to(wide)[:, None, None]
    y = y if bias is None else y + bias.to(wide)[:, None, None]
    return out.copy_(y if residual is None else y + residual.to(wide))


def cost(
    x: Tensor, taps: Tensor, sums: Tensor, scale: Tensor, outputs: int, bias: Tensor | None = None,
    residual: Tensor | None = None, stride: int = 1, doubled: bool = False,
) -> Cost:  # fmt: skip
    """The direct convolution's products and sums, of one that is ``doubled`` those of its four phases of 2 x 2 taps;
    every argument read and the output written once."""
    made = output_shape(x, outputs, stride, doubled)
    written = made[0] * outputs * made[2] * made[3]
    tensors = [t for t in (x, taps, sums, scale, bias, residual) if t is not None]
    moved = sum(t.numel() * t.element_size() for t in tensors) + written * x.element_size()
    flops = (8 if doubled else 18) * written * x.shape[1]
    return Cost(flops=flops, bytes=moved, written=written * x.element_size(), products="int8")


def _arguments(
    g: Generator, x: Tensor, outputs: int, bias: str, residual: bool, stride: int = 1, doubled: bool = False
) -> tuple[Any, ...]:
    weight, scale = random_weight(g, outputs, x.shape[1])
    offset = torch.randn(outputs, generator=g).to(x.dtype if bias == "same" else torch.float32)
    shape = output_shape(x, outputs, stride, doubled)
    more = torch.randn(shape, generator=g).to(x.dtype) if residual else None
    if more is not None and is_channels_last(x):
        more = more.contiguous(memory_format=torch.channels_last)
    given = (*conv_taps_int8.reference(weight), scale, outputs, offset if bias != "no" else None, more)
    return (x, *given, stride, doubled)


def _case(
    name: str, shape: tuple[int, ...], outputs: int, *, kind: str = "channels_last", bias: str = "fp32",
    residual: bool = False, stride: int = 1, doubled: bool = False, bench: bool = False,
) -> Case:  # fmt: skip
    own = kind in ("positive", "extremes", "broken")
    make = quantize_uint8.random_image if own else winograd_conv2d_int8.random_image

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        return _arguments(g, make(g, shape, dtype, kind), outputs, bias, residual, stride, doubled)

    return Case(name, build, dtypes=(torch.bfloat16,) if bench else FLOATS, bench=bench)


def _bench(*shape: int, outputs: int = 0, **more: Any) -> Case:
    outputs = outputs or shape[1]
    words = ["x".join(map(str, shape)), *([f"to {outputs}"] if outputs != shape[1] else [])]
    words += [word for word in ("residual", "doubled") if more.get(word)] + ["stride 2"] * (more.get("stride") == 2)
    return _case(" ".join(words), shape, outputs, bench=True, **more)


CASES = [
    _case("small", (2, 5, 3, 4), 7),
    _case("one pixel", (2, 8, 1, 1), 16, residual=True),
    _case("one channel", (1, 1, 5, 3), 1, bias="same"),
    _case("no batch", (0, 4, 3, 3), 4),
    _case("no pixels", (2, 4, 0, 3), 4),
    _case("no inputs", (2, 0, 3, 3), 4),
    _case("no outputs", (2, 4, 3, 3), 0),
    _case("one row", (1, 17, 1, 37), 19),
    _case("one column", (2, 17, 37, 1), 19),
    _case("prime sizes", (3, 37, 7, 11), 29, residual=True),
    _case("width 8", (2, 64, 8, 8), 64, residual=True),
    _case("width 5", (2, 40, 6, 5), 33, bias="same", residual=True),
    _case("width 17", (2, 66, 3, 17), 64),
    _case("width 67", (1, 65, 5, 67), 70),
    _case("no bias", (1, 16, 4, 4), 16, bias="no"),
    _case("no bias, residual", (1, 16, 4, 4), 32, bias="no", residual=True),
    _case("stride 2", (2, 32, 8, 8), 40, stride=2, residual=True),
    _case("stride 2, odd sizes", (2, 33, 7, 11), 37, stride=2),
    _case("stride 2, one pixel", (3, 16, 1, 1), 16, stride=2),
    _case("stride 2, width 67", (1, 24, 5, 67), 64, stride=2),
    _case("doubled", (2, 34, 3, 5), 37, doubled=True, residual=True),
    _case("doubled, one pixel", (1, 3, 1, 1), 5, doubled=True, bias="no"),
    _case("doubled, several blocks", (2, 66, 19, 13), 70, doubled=True),
    _case("many samples", (19, 20, 3, 3), 24, residual=True),
    _case("several blocks", (3, 67, 33, 19), 130, residual=True),
    _case("many inputs", (1, 521, 6, 7), 40),
    _case("more inputs", (2, 677, 3, 5), 33, residual=True),  # than tiles of AMX sum up at a time
    _case("positive", (2, 48, 6, 7), 40, kind="positive"),
    _case("offset", (2, 48, 6, 7), 40, kind="offset"),
    _case("extremes", (4, 24, 5, 5), 40, kind="extremes", bias="no"),
    _case("broken", (3, 24, 8, 9), 40, kind="broken"),
    _case("contiguous", (2, 16, 6, 6), 16, kind="contiguous"),
    _case("strided", (2, 16, 3, 5), 16, kind="strided"),
    *(_bench(*shape) for shape in ((2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (2, 1280, 8, 8))),
    _bench(2, 960, 64, 64, outputs=320, residual=True),
    _bench(2, 320, 64, 64, stride=2),
    _bench(2, 640, 32, 32, doubled=True),
    _bench(1, 128, 512, 512),
]


def _alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    x, taps, sums, scale, outputs, bias, residual, *rest = args
    return (x[b : b + 1], taps, sums, scale, outputs, bias, None if residual is None else residual[b : b + 1], *rest)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    shape = (*draw.shape(3, 140), *draw.shape(9, 19))
    x = draw.tensor(shape, dtype, layouts=("channels_last", "contiguous"))
    doubled = draw.flag()
    stride = 1 if doubled else draw.choice((1, 2))
    bias = draw.choice(("fp32", "same", "no"))
    return _arguments(draw.generator(), x, draw.integer(0, 70), bias, draw.flag(), stride, doubled)


OP = register(
    Op(
        name="packed_conv2d_int8",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance=winograd_conv2d_int8.OP.tolerance,  # codes and sums are the reference's own here too
        cases=CASES,
        alone=_alone,
        draw=_draw,
        formula="scale_x scale conv2d(codes - zero, 3x3 w, stride 1 or 2) + bias + residual, codes of each sample",
        source="Jacob et al. 2018, arXiv:1712.05877",
    )
)
