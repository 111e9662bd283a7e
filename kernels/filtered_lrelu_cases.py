"""The cases of filtered_lrelu."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator

from fusegen.kernels.draw import Draw
from fusegen.kernels.op import Case
from fusegen.kernels.upfirdn2d_cases import drawn_filter, drawn_padding, make_filter


def _case(
    name: str,
    shape: tuple[int, ...],
    filters: tuple[str, str] = ("sinc12", "sinc12"),
    up: int = 2,
    down: int = 2,
    padding: tuple[int, int, int, int] = (9, 8, 9, 8),
    *,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = 256.0,
    flip: bool = False,
    bias: str = "same",
    layout: str = "contiguous",
    bench: bool = False,
) -> Case:
    """``bias``: the dtype "same" as x or "fp32", or "no"; ``layout``: contiguous, channels_last, rows or samples."""

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        n, c, h, w = shape
        x = torch.randn(2 * n if layout == "samples" else n, c, h, w + 3 * (layout == "rows"), generator=g).to(dtype)
        x = x[::2] if layout == "samples" else x[..., :w]
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        b = (0.5 * torch.randn(c, generator=g)).to(torch.float32 if bias == "fp32" else dtype)
        up_filter, down_filter = (make_filter(f, g) for f in filters)
        own = None if bias == "no" else b
        return (x, up_filter, down_filter, own, up, down, list(padding), gain, slope, clamp, flip)

    return Case(name, build, bench=bench, small=not bench)


def _both(name: str, *args: Any, **more: Any) -> list[Case]:
    return [_case(name, *args, **more), _case(f"{name}, channels-last", *args, layout="channels_last", **more)]


CASES = [
    *_both("up2 down2", (2, 3, 12, 11)),
    *_both("up4 down2", (1, 3, 9, 10), ("24", "sinc12"), 4, 2, (13, 12, 13, 12)),
    *_both("several tiles", (1, 2, 67, 61)),
    *_both("radial down filter", (1, 2, 14, 13), ("sinc12", "12x12")),
    _case("two-dimensional filters, flipped", (2, 2, 9, 8), ("5x4", "3x6"), 3, 2, (3, 4, 2, 5), flip=True),
    _case("no filters", (2, 3, 7, 5), ("none", "none"), 1, 1, (0, 0, 0, 0)),
    *_both("no down filter", (2, 3, 7, 5), ("1331", "none"), 2, 1, (2, 1, 2, 1)),
    _case("no up filter", (2, 3, 17, 15), ("none", "sinc12"), 1, 2, (2, 3, 1, 0)),
    _case("down4", (1, 2, 30, 27), ("sinc12", "24"), 2, 4, (5, 5, 5, 5)),
    *_both("cropped", (1, 2, 25, 23), padding=(-3, -4, -2, -1)),
    _case("one pixel", (2, 3, 1, 1), padding=(17, 12, 15, 14)),
    _case("a slope of 1", (1, 3, 12, 12), gain=1.0, slope=1.0),
    _case("a clamp that bites", (1, 3, 12, 12), clamp=0.3, gain=3.0),
    _case("no clamp, no bias", (1, 3, 12, 12), clamp=None, bias="no"),
    _case("float32 bias", (1, 3, 12, 12), bias="fp32"),
    _case("no batch", (0, 3, 12, 12)),
    _case("no channels", (2, 0, 12, 12)),
    _case("samples apart", (2, 3, 12, 11), layout="samples"),
    _case("padded rows", (2, 3, 12, 11), layout="rows"),
    *_both("256x84x84", (1, 256, 84, 84), bench=True),
    _case("up4 64x148x148", (1, 64, 148, 148), ("24", "sinc12"), 4, 2, (13, 12, 13, 12), bench=True),
    _case("16x532x532", (1, 16, 532, 532), bench=True),
]


def draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments that nobody chose."""
    shape = draw.shape(2, 4, 15, 21)
    x, bias = draw.tensor(shape, dtype, mean=4.0), draw.maybe(shape[1:2], (dtype, torch.float32))
    rise, fall, up, down = drawn_filter(draw), drawn_filter(draw), draw.integer(1, 4), draw.integer(1, 4)
    wide = [1 if f is None else f.shape[-1] for f in (rise, fall)]
    tall = [1 if f is None else f.shape[0] for f in (rise, fall)]
    padding = drawn_padding(draw, (shape[3], shape[2]), (up, up), (sum(wide) - 1, sum(tall) - 1))
    gain, slope, clamp = draw.choice((math.sqrt(2), 0.7)), draw.choice((0.2, 0.0, 1.0)), draw.choice((None, 0.4, 0.0))
    return (x, rise, fall, bias, up, down, padding, gain, slope, clamp, draw.flag())
