"""Images to uint8, each sample by a scale and a zero point of its own: what an int8 convolution reads.

``x`` is about ``scale * (codes - zero)``: the codes span the sample's range, widened to hold zero, so that zero, which
convolutions pad with, has a code of its own (Jacob et al. 2018, section 2.1).  The arithmetic is float32 whatever x is,
so that kernels can be held to it exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw, laid_out
from fusegen.kernels.linear_int8 import TINY
from fusegen.kernels.op import FLOATS, Case, Cost, Op, Tolerance, register

SCHEMA = "(Tensor x) -> (Tensor, Tensor, Tensor)"
LARGEST = 255


def allocate(x: Tensor) -> tuple[Tensor, ...]:
    """Uninitialised: codes (B, C, H, W) uint8, channels-last, scale (B,) float32 and zero (B,) int64.

    Raises ValueError where x has not four dimensions.
    """
    if x.dim() != 4:
        raise ValueError(f"quantize_uint8: x has shape {tuple(x.shape)}, not (B, C, H, W)")
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    return codes, scale, torch.empty(x.shape[0], dtype=torch.int64, device=x.device)


def reference(x: Tensor) -> tuple[Tensor, ...]:
    """``rate = 255 / (high - low)``, ``zero = round(-low rate)``, ``codes = round(x rate) + zero``, ties to even and
    within [0, 255]; low and high are the sample's extremes, or zero.

    A range below 2^-100 counts as zero: scale, zero and codes are 0.  Where it is not finite, codes and zero are 0 and
    the scale is NaN.
    """
    codes, scale, zero = allocate(x)
    if not x.numel():
        scale.zero_(), zero.zero_()
        return codes, scale, zero
    flat = x.float().flatten(1)
    low, high = flat.amin(1).clamp(max=0.0), flat.amax(1).clamp(min=0.0)
    span = high - low
    served = span.isfinite() & (span >= TINY)
    rate = torch.where(served, torch.full_like(span, LARGEST) / span, 0.0)
    point = torch.where(served, (-low * rate).round(), 0.0)
    some = served[:, None, None, None]
    made = ((x.float() * rate[:, None, None, None]).round() + point[:, None, None, None]).clamp(0, LARGEST)
    codes.copy_(torch.where(some, made, 0.0))
    scale.copy_(torch.where(served, span * (1 / LARGEST), torch.where(span.isfinite(), 0.0, torch.nan)))
    zero.copy_(point)
    return codes, scale, zero


def cost(x: Tensor) -> Cost:
    """x read and the codes written once."""
    return Cost(flops=4 * x.numel(), bytes=x.numel() * (x.element_size() + 1), written=x.numel())


def random_image(g: Generator, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> Tensor:
    """Images for cases; ``kind``: a layout, or channels-last samples that are "positive", "extremes" or "broken"."""
    x = torch.randn(shape, generator=g) + 0.5
    if kind == "positive":
        x = x.abs()
    if kind == "extremes":
        x[0], x[1], x[2] = 0.0, x[1] * 1e-36, 0.0
        x[2, 1, 1, 1] = -1e3
    if kind == "broken":
        x[0, 0, 0, 0], x[1, 1, 1, 1] = torch.inf, torch.nan
    return laid_out(x.to(dtype), kind if kind in ("contiguous", "strided") else "channels_last")


def _case(name: str, shape: tuple[int, ...], kind: str = "channels_last", bench: bool = False) -> Case:
    return Case(name, lambda g, dtype: (random_image(g, shape, dtype, kind),), bench=bench)


CASES = [
    _case("small", (2, 16, 5, 7)),
    _case("positive", (2, 16, 5, 7), "positive"),
    _case("extremes", (3, 16, 4, 4), "extremes"),
    _case("broken", (3, 16, 4, 4), "broken"),
    _case("one element", (1, 1, 1, 1)),
    _case("one pixel", (3, 37, 1, 1)),
    _case("one channel", (2, 1, 9, 5)),
    _case("no batch", (0, 4, 3, 3)),
    _case("no pixels", (2, 4, 0, 3)),
    _case("prime sizes", (3, 67, 13, 11)),
    _case("several pieces", (2, 80, 47, 31)),
    _case("contiguous", (2, 16, 5, 7), "contiguous"),
    _case("strided", (2, 16, 5, 7), "strided"),
    *(_case("x".join(map(str, s)), s, bench=True) for s in ((2, 320, 64, 64), (2, 1280, 16, 16))),
]


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    dtype = dtype if dtype in FLOATS else torch.float32
    return (draw.tensor((*draw.shape(3, 40), *draw.shape(9, 9)), dtype, layouts=("channels_last", "contiguous")),)


OP = register(
    Op(
        name="quantize_uint8",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={
            **{dtype: Tolerance(rms=1e-7, peak=2e-7) for dtype in FLOATS},
            torch.uint8: Tolerance(rms=0.0, peak=0.0),  # codes
            torch.int64: Tolerance(rms=0.0, peak=0.0),  # zero points
        },
        cases=CASES,
        draw=_draw,
        formula="codes = round(255 x / span) + zero, span = max(x, 0) - min(x, 0) of each sample",
        source="Jacob et al. 2018, arXiv:1712.05877",
    )
)
