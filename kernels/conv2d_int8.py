"""A convolution with int8 weights, y = act(conv(x, W) + bias) + residual; x is quantized to uint8 on the way.

Each sample has a scale and a zero point of its own (:mod:`.quantize_uint8`), each output channel of the weight a scale;
the products and sums between them are exact integers.  Padding is with zeros, which have a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels import linear_int8, quantize_uint8
from fusegen.kernels.draw import Draw
from fusegen.kernels.linear_int8 import ACTIVATIONS
from fusegen.kernels.op import Case, Cost, Op, register

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, Tensor? residual=None, str activation='none', "
    "int[2] stride=1, int[2] padding=0, int[2] dilation=1) -> Tensor"
)
LONGEST = 2**16  # products of an output: of 255 and 127 they still fit an int32


def output_shape(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """(B, O, H', W') of a convolution."""
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return (x.shape[0], weight.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes))


def allocate(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
    activation: str = "none", stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised output (B, O, H', W') for x (B, I, H, W), weight (O, I, kh, kw) int8, scale (O,): x's dtype,
    channels-last.  Raises ValueError where arguments do not fit.
    """
    if weight.dim() != 4 or weight.dtype != torch.int8 or x.dim() != 4 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"conv2d_int8: x {tuple(x.shape)} and the weight {weight.dtype} {tuple(weight.shape)} are not (B, I, H, W) "
            "and int8 (O, I, kh, kw)"
        )
    if weight.shape[1:].numel() > LONGEST:
        raise ValueError(f"conv2d_int8: {weight.shape[1:].numel()} products a sum are more than {LONGEST}")
    outputs = weight.shape[0]
    if tuple(scale.shape) != (outputs,) or (bias is not None and tuple(bias.shape) != (outputs,)):
        raise ValueError(f"conv2d_int8: scale or bias does not have one value for each of {outputs} channels")
    if activation not in ACTIVATIONS:
        raise ValueError(f"conv2d_int8: no activation is called {activation!r}; there are {', '.join(ACTIVATIONS)}")
    shape = output_shape(x, weight, stride, padding, dilation)
    if min(shape) < 0:
        raise ValueError(f"conv2d_int8: the kernel is larger than the padded x {tuple(x.shape)}")
    if residual is not None and tuple(residual.shape) != shape:
        raise ValueError(f"conv2d_int8: residual has shape {tuple(residual.shape)}, the output has {shape}")
    return (torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last),)


def finish(y: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    """act(y + bias) + residual in y's dtype."""
    y = ACTIVATIONS[activation](y if bias is None else y + bias.to(y.dtype)[:, None, None])
    return y if residual is None else y + residual.to(y.dtype)


def reference(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
    activation: str = "none", stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:  # fmt: skip
    """The integers are exact, in float64; the rest float32, or float64 as x."""
    (out,) = allocate(x, weight, scale, bias, residual, activation, stride, padding, dilation)
    if not out.numel():
        return out
    wide = torch.promote_types(x.dtype, torch.float32)
    codes, scales, zeros = quantize_uint8.reference(x)
    centred = codes.double() - zeros[:, None, None, None]
    empty = not weight.numel()  # of no channels every sum is zero, and PyTorch has no such convolution
    sums = out.double().zero_() if empty else F.conv2d(centred, weight.double(), None, stride, padding, dilation)
    y = sums.to(wide) * scales.to(wide)[:, None, None, None] * scale.to(wide)[:, None, None]
    return out.copy_(finish(y, bias, residual, activation))


def cost(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Any = None, residual: Any = None, activation: str = "none",
    stride: Sequence[int] = (1, 1), padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1),
) -> Cost:  # fmt: skip
    """The products and sums; every argument read and the output written once."""
    shape = output_shape(x, weight, stride, padding, dilation)
    out = shape[0] * shape[1] * max(0, shape[2]) * max(0, shape[3])
    tensors = [t for t in (x, weight, scale, bias, residual) if t is not None]
    written = out * x.element_size()
    moved = sum(t.numel() * t.element_size() for t in tensors) + written
    return Cost(flops=2 * out * weight.shape[1:].numel(), bytes=moved, written=written, products="int8")


def _arguments(
    g: Generator, x: Tensor, outputs: int, kernel: tuple[int, int], residual: bool, tail: tuple[Any, ...]
) -> Any:
    weight = torch.randint(-127, 128, (outputs, x.shape[1], *kernel), generator=g, dtype=torch.int8)
    scale = (0.5 + torch.rand(outputs, generator=g)) / (74 * max(1, weight.shape[1:].numel()) ** 0.5)
    bias, more = torch.randn(outputs, generator=g), None
    if residual:
        shape = output_shape(x, weight, *tail[1:])
        more = torch.randn(shape, generator=g).to(x.dtype).contiguous(memory_format=torch.channels_last)
    return (x, weight, scale, bias, more, *tail)


def _case(
    name: str, shape: tuple[int, ...], outputs: int, *, kernel: int = 3, stride: int = 1, padding: int = 1,
    dilation: int = 1, kind: str = "channels_last", residual: bool = False, activation: str = "none",
) -> Case:  # fmt: skip
    tail = (activation, (stride, stride), (padding, padding), (dilation, dilation))

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x = quantize_uint8.random_image(g, shape, dtype, kind)
        return _arguments(g, x, outputs, (kernel, kernel), residual, tail)

    return Case(name, build)


# None is for benchmarks: a plan makes two of the op, quantize_uint8 and a product of the library's.
CASES = [
    _case("small", (2, 16, 5, 7), 8),
    _case("one pixel", (2, 8, 1, 1), 16),
    _case("one element", (1, 1, 1, 1), 1, kernel=1, padding=0),
    _case("no batch", (0, 4, 3, 3), 4),
    _case("no outputs", (2, 4, 3, 3), 0),
    _case("1x1", (2, 24, 6, 5), 40, kernel=1, padding=0, residual=True),
    _case("stride", (2, 12, 9, 8), 20, stride=2),
    _case("dilated", (1, 9, 8, 7), 6, padding=2, dilation=2),
    _case("prime sizes", (3, 37, 7, 11), 29, residual=True),
    _case("silu", (2, 16, 4, 4), 16, activation="silu", residual=True),
    _case("extremes", (3, 16, 4, 4), 8, kind="extremes"),
    _case("contiguous", (2, 16, 5, 7), 8, kind="contiguous"),
]


def _alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    x, weight, scale, bias, residual, *rest = args
    return (x[b : b + 1], weight, scale, bias, None if residual is None else residual[b : b + 1], *rest)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    x = draw.tensor((*draw.shape(2, 20), *draw.shape(8, 8, low=3)), dtype, layouts=("channels_last", "contiguous"))
    tail = (draw.choice(tuple(ACTIVATIONS)), (draw.choice((1, 2)),) * 2, (draw.choice((0, 1)),) * 2, (1, 1))
    kernel = draw.choice((1, 3))
    return _arguments(draw.generator(), x, draw.integer(0, 20), (kernel, kernel), draw.flag(), tail)


OP = register(
    Op(
        name="conv2d_int8",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance=linear_int8.OP.tolerance,
        cases=CASES,
        alone=_alone,
        draw=_draw,
        formula="act(scale_x scale (conv(codes - zero, W)) + bias) + residual, codes of each sample",
        source="Jacob et al. 2018, arXiv:1712.05877",
    )
)
