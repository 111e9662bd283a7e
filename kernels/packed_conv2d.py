"""A 3x3 convolution with padding 1 and a stride of 1 or 2 by packed taps, or of the nearest 2x upsampling of x, and
what follows it: y = conv2d(x, w) + bias + residual.

The upsampled image is never made: it is convolved by the 2x2 taps of its four phases, 16 products a pixel of x for 36.

A session packs its weights once (:mod:`.conv_taps`).  Products are of bfloat16, their sums float32, in an order that is
a pixel's own: the same whatever the batch is.  :mod:`.winograd_conv2d` has fewer products of the same taps, and rounds
what it multiplies once more.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fusegen.kernels import conv_taps, linear, onednn, upsample2x_conv
from fusegen.kernels.draw import Draw, laid_out
from fusegen.kernels.op import Case, Cost, Op, is_channels_last, register

SCHEMA = (
    "(Tensor x, Tensor taps, int outputs, Tensor? bias=None, Tensor? residual=None, int stride=1, bool doubled=False) "
    "-> Tensor"
)


def allocate(
    x: Tensor,
    taps: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    doubled: bool = False,
) -> tuple[Tensor, ...]:
    """The uninitialised output (B, O, ceil(H / stride), ceil(W / stride)), or where ``doubled`` (B, O, 2 H, 2 W), O =
    ``outputs``, for x (B, I, H, W), taps of :mod:`.conv_taps`, bias (O,) in float32 or x's dtype, and a residual of the
    output's shape and x's dtype: x's dtype, channels-last where x is that and not also contiguous, else contiguous.

    Raises ValueError where they do not fit.
    """
    if stride not in (1, 2) or (doubled and stride != 1):
        raise ValueError(f"packed_conv2d: the stride is {stride}, neither 1 nor 2, or x is doubled and it is not 1")
    if x.dim() != 4 or tuple(taps.shape) != conv_taps.taps_shape(outputs, x.shape[1], doubled):
        raise ValueError(
            f"packed_conv2d: x {tuple(x.shape)}, taps {tuple(taps.shape)} and {outputs} outputs are not (B, I, H, W), "
            "such a weight's (:mod:`.conv_taps`), and at most 32 P"
        )
    if bias is not None and (tuple(bias.shape) != (outputs,) or bias.dtype not in (torch.float32, x.dtype)):
        raise ValueError(f"packed_conv2d: bias is {bias.dtype} {tuple(bias.shape)}, not {x.dtype} ({outputs},)")
    shape = _output_shape(x, outputs, stride, doubled)
    if residual is not None and (tuple(residual.shape) != shape or residual.dtype != x.dtype):
        raise ValueError(f"packed_conv2d: residual is {residual.dtype} {tuple(residual.shape)}, not {x.dtype} {shape}")
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return (torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout),)


def reference(
    x: Tensor,
    taps: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    doubled: bool = False,
) -> Tensor:
    """The convolution by the weight or the phases that the taps hold, in float32, or float64 where x is."""
    (out,) = allocate(x, taps, outputs, bias, residual, stride, doubled)
    if out.numel() == 0:
        return out
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros_like(out, dtype=wide)
    if x.shape[1] and doubled:
        phases = conv_taps.phases_of(taps, x.shape[1])[..., :outputs]
        y = upsample2x_conv.reference(x.to(wide), phases.to(wide))
    elif x.shape[1]:  # PyTorch does not convolve nothing
        y = F.conv2d(x.to(wide), weight_of(taps, outputs, x.shape[1]).to(wide), stride=stride, padding=1)
    y = y if bias is None else y + bias.to(wide)[:, None, None]
    return out.copy_(y if residual is None else y + residual.to(wide))


def _output_shape(x: Tensor, outputs: int, stride: int, doubled: bool) -> tuple[int, ...]:
    height, width = (2 * n if doubled else -(-n // stride) for n in x.shape[2:])
    return (x.shape[0], outputs, height, width)


def weight_of(taps: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight (O, I, 3, 3) that the taps hold."""
    return conv_taps.weight_of(taps, inputs)[:outputs]


def cost(
    x: Tensor,
    taps: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    doubled: bool = False,
) -> Cost:
    """The products and sums, where ``doubled`` those of the phases; every argument read and the output written once."""
    written = math.prod(_output_shape(x, outputs, stride, doubled))
    read = sum(t.numel() * t.element_size() for t in (x, taps, bias, residual) if t is not None)
    return Cost(flops=(8 if doubled else 18) * written * x.shape[1], bytes=read + written * x.element_size())


def _tail(
    g: Generator, x: Tensor, outputs: int, bias: str, residual: bool, stride: int, doubled: bool = False
) -> tuple[Any, ...]:
    """The arguments behind x: taps of a random weight, bias ("same" dtype as x, "fp32" or "no") and residual."""
    weight = torch.randn(outputs, x.shape[1], 3, 3, generator=g) / (9 * max(x.shape[1], 1)) ** 0.5
    offset = torch.randn(outputs, generator=g).to(torch.float32 if bias == "fp32" else x.dtype)
    more = torch.randn(_output_shape(x, outputs, stride, doubled), generator=g).to(x.dtype)
    more = more.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else more
    taps = conv_taps.reference(weight.to(x.dtype), doubled)
    return (taps, outputs, None if bias == "no" else offset, more if residual else None, stride, doubled)


def _case(
    name: str, shape: tuple[int, ...], outputs: int, *, layout: str = "channels_last", bias: str = "same",
    residual: bool = False, stride: int = 1, doubled: bool = False, part: tuple[slice, ...] = (), bench: bool = False,
) -> Case:  # fmt: skip
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x = laid_out(torch.randn(shape, generator=g).to(dtype), layout)[part]
        if layout == "unaligned":  # and channels-last
            x = x.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
        return (x, *_tail(g, x, outputs, bias, residual, stride, doubled))

    return Case(name, build, dtypes=(torch.bfloat16,), bench=bench)


def _bench(*shape: int, outputs: int = 0, **more: Any) -> Case:
    outputs = outputs or shape[1]
    words = ["x".join(map(str, shape)), *([f"to {outputs}"] if outputs != shape[1] else [])]
    words += [word for word in ("residual", "doubled") if more.get(word)] + ["stride 2"] * (more.get("stride") == 2)
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
    _case("doubled", (2, 34, 3, 5), 37, doubled=True, residual=True),
    _case("doubled, one pixel", (1, 3, 1, 1), 5, doubled=True, bias="no"),
    _case("doubled, no pixels", (2, 4, 0, 3), 4, doubled=True),
    _case("doubled, no inputs", (2, 0, 3, 3), 4, doubled=True),
    _case("doubled, several blocks", (2, 66, 33, 19), 70, doubled=True, bias="fp32"),
    _case("doubled, many inputs", (3, 749, 3, 5), 33, doubled=True),
    _case("doubled, contiguous", (2, 16, 6, 6), 16, doubled=True, layout="contiguous"),
    _bench(2, 320, 64, 64),
    _bench(2, 640, 32, 32),
    _bench(2, 1280, 16, 16),
    _bench(2, 1280, 8, 8),
    _bench(2, 960, 64, 64, outputs=320, residual=True),
    _bench(2, 320, 64, 64, stride=2),
    _bench(1, 256, 256, 256),
    _bench(1, 512, 128, 128),
    _bench(2, 1280, 8, 8, doubled=True),
    _bench(2, 640, 32, 32, doubled=True),
    _bench(1, 256, 256, 256, doubled=True),
]


_plain: Any = WeakTensorKeyDictionary()  # taps -> the weight they hold, in oneDNN's form on a CPU


def _plain_weight(image: Tensor, taps: Tensor, outputs: int, stride: int, doubled: bool) -> Tensor:
    """The weight as a user of PyTorch has it, made once for such an image: packed by oneDNN where it serves."""
    if taps not in _plain:
        found = upsample2x_conv.unfolded(conv_taps.phases_of(taps, image.shape[1])) if doubled else None
        weight = weight_of(taps, outputs, image.shape[1]) if found is None else found[:outputs]
        weight = weight.to(image.dtype).contiguous(memory_format=torch.channels_last)
        half = image.dtype == torch.bfloat16 and image.device.type == "cpu"
        if half and onednn.serves(image.dtype) and image.numel() and outputs:
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
            weight = reorder(weight.to_mkldnn(), [1, 1], [stride] * 2, [1, 1], 1, list(image.shape))
        _plain[taps] = weight
    made: Tensor = _plain[taps]
    return made


def _eager(
    x: Tensor, taps: Tensor, outputs: int, bias: Any, residual: Any, stride: int, doubled: bool = False
) -> Tensor:
    image = F.interpolate(x, scale_factor=2.0, mode="nearest") if doubled and x.numel() else x
    weight, bias = _plain_weight(image, taps, outputs, stride, doubled), None if bias is None else bias.to(x.dtype)
    if not weight.is_mkldnn:
        y = F.conv2d(image, weight, bias, stride, 1)
        return y if residual is None else y + residual
    pointwise, where = torch.ops.mkldnn._convolution_pointwise, ([1, 1], [stride] * 2, [1, 1], 1)
    if residual is None:
        return pointwise(image, weight, bias, *where, "none", [], "")
    return pointwise.binary(image, residual, weight, bias, *where, "add", None, None, [], None)


def _alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    x, taps, outputs, bias, residual, *rest = args
    return (x[b : b + 1], taps, outputs, bias, None if residual is None else residual[b : b + 1], *rest)


def _draw(choices: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    shape = (*choices.shape(3, 40), *choices.shape(9, 19))
    x = choices.tensor(shape, dtype, layouts=("channels_last", "contiguous"))
    bias, residual, doubled = choices.choice(("same", "fp32", "no")), choices.flag(), choices.flag()
    outputs, stride = choices.integer(0, 70), 1 if doubled else choices.choice((1, 2))
    return (x, *_tail(choices.generator(), x, outputs, bias, residual, stride, doubled))


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
        formula="conv2d(x or its nearest 2x upsampling, 3x3 w, stride 1 or 2, padding 1) + bias + residual",
        source="torch.nn.functional.conv2d",
    )
)
