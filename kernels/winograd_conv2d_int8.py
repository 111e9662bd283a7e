"""A 3x3 convolution with padding 1 in int8 by Winograd's F(2 x 2, 3 x 3): 16 products of channels for four pixels.

Tiles of 4 x 4 pixels, two apart, are transformed in float32.  At each of its 16 points a tile's channels are quantized
by a scale of their own, as :mod:`.linear_int8` does a row of x; the filters are those of :mod:`.winograd_int8_filters`,
the products and sums between them exact integers.  What is quantized behind the transform, with a scale for each point,
is not amplified by it (Li et al. 2021, LoWino), and a tile's bits depend on nothing else.

Where x is ``doubled``, a nearest 2x upsampling of it is convolved, in nine products, as in :mod:`.winograd_conv2d`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels import winograd_int8_filters
from fusegen.kernels.draw import Draw, laid_out
from fusegen.kernels.linear_int8 import codes_of
from fusegen.kernels.op import FLOATS, Case, Cost, Op, Tolerance, is_channels_last, register
from fusegen.kernels.winograd_conv2d import images, larger
from fusegen.kernels.winograd_int8_filters import GROUP, WORD, ZERO

SCHEMA = (
    "(Tensor x, Tensor filters, Tensor scale, int outputs, Tensor? bias=None, Tensor? residual=None,"
    " bool doubled=False) -> Tensor"
)
LONGEST = 2**16  # input channels: their products still fit an int32


def allocate(
    x: Tensor, filters: Tensor, scale: Tensor, outputs: int, bias: Tensor | None = None, residual: Tensor | None = None,
    doubled: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised output (B, O, H, W), or (B, O, 2 H, 2 W) where x is ``doubled``, for x (B, I, H, W), filters
    (P, 4, 4, ceil(I / 4), 32, 4) uint8, scale (P, 4, 4, 32), bias (O,) and a residual of the output's shape, which is
    added: channels-last where x is that and not also contiguous, else contiguous.

    Raises ValueError where they do not fit.
    """
    groups = -(-outputs // GROUP)
    fits = x.dim() == 4 and filters.dtype == torch.uint8 and tuple(scale.shape) == (groups, 4, 4, GROUP)
    if not fits or tuple(filters.shape) != (groups, 4, 4, -(-x.shape[1] // WORD), GROUP, WORD):
        raise ValueError(
            f"winograd_conv2d_int8: x {tuple(x.shape)}, filters {filters.dtype} {tuple(filters.shape)}, scale "
            f"{tuple(scale.shape)} and {outputs} outputs are not (B, I, H, W), uint8 (P, 4, 4, ceil(I / 4), 32, 4), "
            "(P, 4, 4, 32) and at most 32 P"
        )
    if x.shape[1] > LONGEST:
        raise ValueError(f"winograd_conv2d_int8: {x.shape[1]} products a sum are more than {LONGEST}")
    return (images("winograd_conv2d_int8", x, outputs, bias, residual, 2 if doubled else 1),)


def _spread(d: Tensor, dim: int) -> Tensor:
    """B^T d along ``dim``, of four, by additions alone: an infinity stays where it is."""
    a, b, c, e = d.unbind(dim)
    return torch.stack((a - c, b + c, c - b, b - e), dim)


def _gather(m: Tensor, dim: int) -> Tensor:
    """A^T m along ``dim``: four become two."""
    a, b, c, e = m.unbind(dim)
    return torch.stack((a + b + c, b - c - e), dim)


def reference(
    x: Tensor, filters: Tensor, scale: Tensor, outputs: int, bias: Tensor | None = None, residual: Tensor | None = None,
    doubled: bool = False,
) -> Tensor:  # fmt: skip
    """The transform and the codes in float32, exact integers, and the rest in float32, or float64 where x is.

    A point whose largest magnitude is below 2^-100 counts as zero; where it is not finite, its outputs are NaN.
    """
    (out,) = allocate(x, filters, scale, outputs, bias, residual, doubled)
    if out.numel() == 0:
        return out
    wide = torch.promote_types(x.dtype, torch.float32)
    height, width = out.shape[2:]
    tiles = F.pad(larger(x, doubled).float(), (1, 3, 1, 3)).unfold(2, 4, 2).unfold(3, 4, 2)
    tiles = tiles[:, :, : -(-height // 2), : -(-width // 2)].permute(0, 2, 3, 4, 5, 1)
    codes, by = codes_of(_spread(_spread(tiles, 3), 4))
    laid = filters.permute(1, 2, 3, 5, 0, 4).flatten(4).flatten(2, 3)  # (4, 4, I, O), with what pads both
    own = laid[:, :, : x.shape[1], :outputs].double() - ZERO
    sums = torch.einsum("nyxabc,abco->nyxabo", codes.double(), own)
    made = sums.to(wide) * by.to(wide) * scale.to(wide).permute(1, 2, 0, 3).flatten(2)[..., :outputs]
    y = _gather(_gather(made, 3), 4)
    y = y.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)[:, :, :height, :width]
    y = y if bias is None else y + bias.to(wide)[:, None, None]
    return out.copy_(y if residual is None else y + residual.to(wide))


def cost(
    x: Tensor, filters: Tensor, scale: Tensor, outputs: int, bias: Tensor | None = None, residual: Tensor | None = None,
    doubled: bool = False,
) -> Cost:  # fmt: skip
    """The direct convolution's operations, so that rates compare, of one that is ``doubled`` those of its four phases
    of 2 x 2 taps; each tensor read or written once."""
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    written = (4 if doubled else 1) * pixels * outputs * x.element_size()
    tensors = [t for t in (x, filters, scale, bias, residual) if t is not None]
    moved = sum(t.numel() * t.element_size() for t in tensors) + written
    flops = (32 if doubled else 18) * pixels * x.shape[1] * outputs
    return Cost(flops=flops, bytes=moved, written=written, products="int8")


def _arguments(
    g: Generator, x: Tensor, outputs: int, bias: str, residual: bool, doubled: bool = False
) -> tuple[Any, ...]:
    filters, scale = winograd_int8_filters.reference(*winograd_int8_filters.random_weight(g, outputs, x.shape[1]))
    offset = torch.randn(outputs, generator=g).to(x.dtype if bias == "same" else torch.float32)
    size = (n * (2 if doubled else 1) for n in x.shape[2:])
    more = torch.randn(x.shape[0], outputs, *size, generator=g).to(x.dtype) if residual else None
    if more is not None and is_channels_last(x):
        more = more.contiguous(memory_format=torch.channels_last)
    return (x, filters, scale, outputs, offset if bias != "no" else None, more, doubled)


def random_image(g: Generator, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Tensor:
    """Images for cases; ``kind``: a layout, or channels-last samples that are "offset" (mean >> std), "extremes"
    (zeros, tiny values, an outlier and nothing else, one among others) or "broken" (an infinity, a NaN)."""
    x = torch.randn(shape, generator=g)
    if kind == "offset":
        x = x * 0.1 + 30
    if kind == "extremes":
        x[0], x[1], x[2] = 0.0, x[1] * 1e-36, 0.0
        x[2, 1, 1, 1], x[3, 2, 2, 1] = -1e3, 1e3
    if kind == "broken":
        x[0, 0, 0, 0], x[1, 1, 3, 4] = torch.inf, torch.nan
    return laid_out(x.to(dtype), kind if kind in ("contiguous", "strided") else "channels_last")


def _case(
    name: str, shape: tuple[int, ...], outputs: int, *, kind: str = "channels_last", bias: str = "fp32",
    residual: bool = False, doubled: bool = False, bench: bool = False, small: bool = True,
) -> Case:  # fmt: skip
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        return _arguments(g, random_image(g, shape, dtype, kind), outputs, bias, residual, doubled)

    return Case(name, build, dtypes=(torch.bfloat16,) if bench else FLOATS, bench=bench, small=small)


CASES = [
    _case("small", (2, 5, 3, 4), 7),
    _case("one pixel", (2, 8, 1, 1), 16),
    _case("one channel", (1, 1, 5, 3), 1, bias="same"),
    _case("no batch", (0, 4, 3, 3), 4, small=False),
    _case("no pixels", (2, 4, 0, 3), 4),
    _case("no inputs", (2, 0, 3, 3), 4, small=False),
    _case("no outputs", (2, 4, 3, 3), 0),
    _case("one row", (1, 17, 1, 37), 19, small=False),
    _case("one column", (2, 17, 37, 1), 19, small=False),
    _case("prime sizes", (3, 37, 7, 11), 29, residual=True, small=False),
    _case("residual", (2, 64, 8, 8), 48, residual=True),
    _case("no bias", (1, 66, 4, 4), 16, bias="no"),
    _case("no bias, residual", (1, 16, 4, 4), 32, bias="no", residual=True),
    _case("two groups", (2, 130, 5, 9), 59, bias="same", small=False),
    _case("offset", (2, 48, 6, 7), 40, kind="offset"),
    _case("extremes", (4, 24, 5, 5), 40, kind="extremes", bias="no"),
    _case("broken", (3, 24, 8, 9), 40, kind="broken"),
    _case("contiguous", (2, 16, 6, 6), 16, kind="contiguous"),
    _case("strided", (2, 16, 3, 5), 16, kind="strided"),
    _case("several blocks", (3, 33, 33, 19), 70, residual=True, small=False),
    _case("doubled", (2, 34, 3, 5), 37, doubled=True, residual=True),
    _case("doubled, one pixel", (1, 3, 1, 1), 5, doubled=True, bias="no"),
    _case("doubled, broken", (3, 24, 8, 9), 40, kind="broken", doubled=True),
    _case("doubled, extremes", (4, 24, 5, 5), 40, kind="extremes", bias="same", doubled=True),
    _case("doubled, several blocks", (2, 66, 19, 13), 70, doubled=True, small=False),
    *(
        _case("x".join(map(str, shape)), shape, shape[1], bench=True, small=False)
        for shape in ((2, 128, 16, 16), (2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (2, 1280, 8, 8))
    ),
    *(
        _case("x".join(map(str, shape)) + ", doubled", shape, shape[1], doubled=True, bench=True, small=False)
        for shape in ((2, 1280, 8, 8), (2, 640, 32, 32))
    ),
]


def _alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    x, filters, scale, outputs, bias, residual, doubled = args
    return (x[b : b + 1], filters, scale, outputs, bias, None if residual is None else residual[b : b + 1], doubled)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    shape = (*draw.shape(2, 80), *draw.shape(11, 11))
    x = draw.tensor(shape, dtype, layouts=("channels_last", "contiguous"))
    bias = draw.choice(("fp32", "same", "no"))
    return _arguments(draw.generator(), x, draw.integer(0, 70), bias, draw.flag(), draw.flag())


OP = register(
    Op(
        name="winograd_conv2d_int8",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        # Codes and sums are the reference's own; the rest rounds as often as it.  Measured on the cases and 1500 random
        # ones at every level: float32 rms 9.6e-8 and peak 1.9e-7 (more where sums pass 2^24), bfloat16 2.0e-3 and
        # 3.7e-3, float16 2.5e-4 and 4.7e-4: those of rounding the output once, whose worst is 2^-8 and 2^-11.
        tolerance={
            torch.float32: Tolerance(rms=5e-7, peak=1e-6),
            torch.bfloat16: Tolerance(rms=3.91e-3, peak=3.91e-3),
            torch.float16: Tolerance(rms=4.9e-4, peak=4.9e-4),
        },
        cases=CASES,
        alone=_alone,
        draw=_draw,
        formula="A^T (s_p t_p (round(B^T d B / s_p) . U_p)) A + bias + residual, p each of 16 points, d each tile",
        source="Lavin & Gray 2015, arXiv:1509.09308; Li et al. 2021 (LoWino), ICPP",
    )
)
