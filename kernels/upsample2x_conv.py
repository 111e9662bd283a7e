"""Nearest 2x upsampling and the 3x3 convolution after it, as four 2x2 convolutions of the small image.

Each of the four output phases (even or odd row, even or odd column) has its own 2x2 filter, the sum of the weights that
fall on the same input pixel (:mod:`.upsample2x_filters`): 16 products a pixel and pair of channels where the upsampled
image takes 36, and the upsampled image is never written.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels import upsample2x_filters
from fusegen.kernels.draw import Draw, laid_out
from fusegen.kernels.op import Case, Cost, Op, Tolerance, is_channels_last, register

SCHEMA = "(Tensor x, Tensor filters, Tensor? bias=None) -> Tensor"


def allocate(x: Tensor, filters: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """The uninitialised output (B, O, 2 H, 2 W) for x (B, I, H, W), filters (2, 2, 2, 2, I, O) and bias (O,): channels-
    last where x is that and not also contiguous, else contiguous.  Raises ValueError where they do not fit.
    """
    if x.dim() != 4 or filters.dim() != 6 or tuple(filters.shape[:5]) != (2, 2, 2, 2, x.shape[1]):
        raise ValueError(
            f"upsample2x_conv: x {tuple(x.shape)} and filters {tuple(filters.shape)} are not (B, I, H, W) and "
            "(2, 2, 2, 2, I, O)"
        )
    if filters.dtype != x.dtype:
        raise ValueError(f"upsample2x_conv: x is {x.dtype} and filters are {filters.dtype}")
    outputs = filters.shape[5]
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"upsample2x_conv: bias has shape {tuple(bias.shape)}, not ({outputs},)")
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    shape = (x.shape[0], outputs, 2 * x.shape[2], 2 * x.shape[3])
    return (torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout),)


def reference(x: Tensor, filters: Tensor, bias: Tensor | None = None) -> Tensor:
    """Tap t of phase p lies on row y + t - 1 + p of the image; outside of it there are zeros.  In float32, or float64
    where x is."""
    (out,) = allocate(x, filters, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    height, width = x.shape[2:]
    padded = F.pad(x.to(wide), (1, 1, 1, 1))
    for p in range(2):
        for q in range(2):
            y = torch.zeros(out.shape[0], out.shape[1], height, width, dtype=wide, device=x.device)
            for t in range(2):
                for s in range(2):
                    part = padded[:, :, p + t : p + t + height, q + s : q + s + width]
                    y += torch.einsum("bihw,io->bohw", part, filters[p, q, t, s].to(wide))
            out[:, :, p::2, q::2] = y if bias is None else y + bias.to(wide)[:, None, None]
    return out


def cost(x: Tensor, filters: Tensor, bias: Tensor | None = None) -> Cost:
    """16 multiplications and additions an input pixel and pair of channels; each tensor read or written once."""
    batch, inputs, height, width = x.shape
    outputs = filters.shape[5]
    elements = x.numel() + filters.numel() + 4 * batch * outputs * height * width
    extra = 0 if bias is None else bias.numel() * bias.element_size()
    return Cost(flops=32 * batch * height * width * inputs * outputs, bytes=elements * x.element_size() + extra)


def _arguments(g: Generator, x: Tensor, outputs: int, bias: torch.dtype | None) -> tuple[Any, ...]:
    inputs = x.shape[1]
    weight = torch.randn(outputs, inputs, 3, 3, generator=g) / (9 * max(inputs, 1)) ** 0.5
    offset = None if bias is None else torch.randn(outputs, generator=g).to(bias)
    return (x, upsample2x_filters.reference(weight).to(x.dtype), offset)


def _case(
    name: str,
    shape: tuple[int, ...],
    outputs: int,
    *,
    layout: str = "contiguous",
    bias: str = "same",
    mean: float = 0.0,
    bench: bool = False,
    small: bool = True,
) -> Case:
    """``bias``: of x's dtype ("same"), "fp32" or "no"."""

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x = laid_out((torch.randn(shape, generator=g) + mean).to(dtype), layout)
        return _arguments(g, x, outputs, {"same": dtype, "fp32": torch.float32, "no": None}[bias])

    return Case(name, build, bench=bench, small=small)


def _bench(*shape: int) -> list[Case]:
    name = "x".join(map(str, shape))
    last = _case(f"{name} channels-last", shape, shape[1], layout="channels_last", bench=True, small=False)
    return [_case(name, shape, shape[1], bench=True, small=False), last]


CASES = [
    _case("small", (2, 5, 3, 4), 7),
    _case("one pixel", (2, 8, 1, 1), 16),
    _case("one channel", (1, 1, 5, 3), 1),
    _case("no batch", (0, 4, 3, 3), 4, small=False),
    _case("no pixels", (2, 4, 0, 3), 4),
    _case("no inputs", (2, 0, 3, 3), 4, small=False),
    _case("no outputs", (2, 4, 3, 3), 0),
    _case("one row", (1, 17, 1, 37), 19, small=False),
    _case("one column", (2, 17, 37, 1), 19, small=False),
    _case("prime sizes", (3, 37, 7, 11), 29, small=False),
    _case("channels-last", (2, 32, 3, 5), 32, layout="channels_last"),
    _case("channels-last odd channels", (2, 35, 2, 5), 33, layout="channels_last"),
    _case("channels-last one pixel", (3, 33, 1, 1), 65, layout="channels_last", small=False),
    _case("three outputs", (1, 40, 3, 5), 3, layout="channels_last"),
    _case("no bias", (1, 16, 4, 4), 16, bias="no"),
    _case("float32 bias", (1, 16, 4, 4), 16, bias="fp32"),
    _case("mean far above deviation", (1, 16, 6, 6), 16, mean=16.0, layout="channels_last", small=False),
    _case("unaligned", (2, 16, 3, 5), 16, layout="unaligned"),
    _case("padded rows", (2, 16, 3, 5), 16, layout="padded", small=False),
    _case("strided", (2, 16, 3, 5), 16, layout="strided"),
    _case("transposed", (4, 4, 3, 5), 8, layout="transposed"),
    _case("several tiles", (1, 72, 9, 17), 136, layout="channels_last", small=False),
    _case("several tiles contiguous", (1, 72, 9, 17), 136, small=False),
    *_bench(2, 1280, 8, 8),
    *_bench(2, 1280, 16, 16),
    *_bench(2, 640, 32, 32),
    *_bench(1, 512, 64, 64),
    *_bench(1, 256, 256, 256),
    *_bench(2, 160, 16, 16),
]


@functools.lru_cache(maxsize=1)
def unfolded(filters: Tensor) -> Tensor:
    """The 3x3 weight (O, I, 3, 3) whose phases the filters are; kept, as the filters are."""
    rows = torch.stack((filters[0, :, 0], filters[0, :, 1] - filters[1, :, 1], filters[1, :, 1]))
    both = torch.stack((rows[:, 0, 0], rows[:, 0, 1] - rows[:, 1, 1], rows[:, 1, 1]), 1)
    return both.permute(3, 2, 0, 1).contiguous()


def _eager(x: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
    own = None if bias is None else bias.to(x.dtype)
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), unfolded(filters), own, padding=1)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    shape, outputs = (*draw.shape(2, 40), *draw.shape(9, 9)), draw.integer(0, 70)
    bias = draw.choice((dtype, torch.float32, None))
    return _arguments(draw.generator(), draw.tensor(shape, dtype), outputs, bias)


OP = register(
    Op(
        name="upsample2x_conv",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={
            torch.float32: Tolerance(rms=2e-6, peak=4e-6),
            torch.bfloat16: Tolerance(rms=4e-3, peak=4.2e-3),
            torch.float16: Tolerance(rms=5e-4, peak=5.2e-4),
        },
        cases=CASES,
        eager=_eager,
        draw=_draw,
        formula="conv2d(nearest 2x upsampling of x, 3x3 weight, padding 1) + bias, a 2x2 filter for each output phase",
        source="Odena et al. 2016, doi:10.23915/distill.00003 (resize-convolution); polyphase identity",
    )
)
