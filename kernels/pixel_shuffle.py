"""Pixel shuffle and its inverse: channels to pixels and back (Shi et al. 2016, "sub-pixel convolution")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw, laid_out
from fusegen.kernels.op import Case, Cost, Op, Spelling, Tolerance, is_channels_last, register

SCHEMA = "(Tensor x, int factor, bool down=False) -> Tensor"


def allocate(x: Tensor, factor: int, down: bool = False) -> tuple[Tensor, ...]:
    """The uninitialised output for x (*, C, H, W): (*, C / factor^2, H factor, W factor), or where ``down``
    (*, C factor^2, H / factor, W / factor).  Channels-last where x is that and not also contiguous, else contiguous.
    Raises ValueError where a size does not divide.
    """
    if x.dim() < 3 or factor < 1:
        raise ValueError(f"pixel_shuffle: it takes (*, C, H, W) and a factor from 1 on, not {tuple(x.shape)}, {factor}")
    channels, height, width = x.shape[-3:]
    if down and (height % factor or width % factor):
        raise ValueError(f"pixel_shuffle: {height} x {width} pixels do not divide by the factor {factor}")
    if not down and channels % factor**2:
        raise ValueError(f"pixel_shuffle: {channels} channels do not divide by the square of the factor {factor}")
    if down:
        shape = (*x.shape[:-3], channels * factor**2, height // factor, width // factor)
    else:
        shape = (*x.shape[:-3], channels // factor**2, height * factor, width * factor)
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return (torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout),)


def reference(x: Tensor, factor: int, down: bool = False) -> Tensor:
    """out[c, h r + i, w r + j] = x[(c r + i) r + j, h, w] with r the factor; where ``down``, the other way round."""
    (out,) = allocate(x, factor, down)
    channels, height, width = out.shape[-3:]
    if down:
        split = x.reshape(*x.shape[:-3], channels // factor**2, height, factor, width, factor)
        moved = split.movedim((-3, -1), (-4, -3))  # (*, C, i, j, h, w)
    else:
        split = x.reshape(*x.shape[:-3], channels, factor, factor, *x.shape[-2:])
        moved = split.movedim((-4, -3), (-3, -1))  # (*, C, h, i, w, j)
    return out.copy_(moved.reshape(out.shape))


def cost(x: Tensor, factor: int, down: bool = False) -> Cost:
    """No arithmetic; every element is read and written once."""
    return Cost(flops=0, bytes=2 * x.numel() * x.element_size())


def _case(
    name: str,
    shape: tuple[int, ...],
    factor: int,
    down: bool = False,
    *,
    layout: str = "contiguous",
    bench: bool = False,
    small: bool = True,
) -> Case:
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        return (laid_out(torch.randn(shape, generator=g).to(dtype), layout), factor, down)

    return Case(name, build, bench=bench, small=small)


def _bench(shape: tuple[int, ...], factor: int, down: bool = False) -> list[Case]:
    name = "x".join(map(str, shape)) + (" down" if down else " up") + f" {factor}"
    last = _case(f"{name} channels-last", shape, factor, down, layout="channels_last", bench=True, small=False)
    return [_case(name, shape, factor, down, bench=True, small=False), last]


CASES = [
    _case("up 2", (2, 8, 3, 5), 2),
    _case("down 2", (2, 3, 6, 10), 2, True),
    _case("up 3", (2, 18, 7, 4), 3),
    _case("down 3", (1, 2, 9, 39), 3, True),
    _case("up 4, prime sizes", (1, 16, 13, 37), 4),
    _case("down 4", (2, 2, 12, 148), 4, True),
    _case("up 5", (1, 50, 2, 3), 5),
    _case("down 8", (1, 3, 16, 24), 8, True, small=False),
    _case("factor 1", (2, 3, 4, 5), 1),
    _case("no batch", (0, 4, 3, 3), 2),
    _case("no channels", (2, 0, 3, 3), 2),
    _case("no pixels down", (2, 3, 0, 4), 2, True),
    _case("one pixel", (3, 4, 1, 1), 2),
    _case("channels-last up 2", (2, 12, 5, 7), 2, layout="channels_last"),
    _case("channels-last down 2", (2, 37, 4, 6), 2, True, layout="channels_last"),
    _case("channels-last up 3", (1, 9 * 19, 3, 5), 3, layout="channels_last"),
    _case("channels-last down 3", (2, 5, 6, 9), 3, True, layout="channels_last"),
    _case("channels-last down 4", (1, 3, 8, 12), 4, True, layout="channels_last"),
    _case("unaligned up 2", (2, 8, 3, 35), 2, layout="unaligned"),
    _case("unaligned down 2", (2, 3, 6, 70), 2, True, layout="unaligned"),
    _case("padded rows up 2", (2, 8, 3, 5), 2, layout="padded"),
    _case("strided rows down 2", (2, 3, 4, 6), 2, True, layout="strided"),
    _case("transposed", (4, 4, 3, 5), 2, layout="transposed"),
    _case("three dimensions", (8, 3, 5), 2, small=False),
    _case("five dimensions", (2, 3, 8, 3, 5), 2, small=False),
    *_bench((1, 256, 256, 256), 2),
    *_bench((1, 48, 512, 512), 4),
    *_bench((1, 64, 512, 512), 2, True),
    *_bench((1, 3, 2048, 2048), 4, True),
]


def _up(x: Tensor, *, factor: int = 2) -> Tensor:
    return F.pixel_shuffle(x, factor)


def _down(x: Tensor, *, factor: int = 2) -> Tensor:
    return F.pixel_unshuffle(x, factor)


def _call_down(**captures: Any) -> Mapping[str, Any] | str:
    return {**captures, "down": True}


SPELLINGS = [
    Spelling("pixel_shuffle", _up, lambda: (torch.zeros(2, 8, 3, 5),), dict),
    Spelling("pixel_unshuffle", _down, lambda: (torch.zeros(2, 3, 6, 4),), _call_down),
]


def _eager(x: Tensor, factor: int, down: bool) -> Tensor:
    return F.pixel_unshuffle(x, factor) if down else F.pixel_shuffle(x, factor)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    factor, down = draw.integer(1, 5), draw.flag()
    batch, channels, height, width = draw.shape(3, 9, 9, 40)
    if down:
        shape = (batch, channels, height * factor, width * factor)
    else:
        shape = (batch, channels * factor**2, height, width)
    return (draw.tensor(shape, dtype), factor, down)


OP = register(
    Op(
        name="pixel_shuffle",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={dtype: Tolerance(0.0, 0.0) for dtype in (torch.float32, torch.bfloat16, torch.float16)},
        cases=CASES,
        spellings=SPELLINGS,
        eager=_eager,
        draw=_draw,
        formula="out[c, h r + i, w r + j] = x[(c r + i) r + j, h, w]; where down, the other way round",
        source="Shi et al. 2016, arXiv:1609.05158",
    )
)
