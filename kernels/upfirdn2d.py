"""Upsample, pad, filter, downsample: the resampling op of StyleGAN (Karras et al. 2019, 2020, 2021).

Every channel of x (B, C, H, W) by itself: up - 1 zeros are inserted after each element, zeros are added around (or
elements taken away where ``padding`` is negative), the result is convolved with a finite impulse response where the
filter lies wholly inside, and every ``down``-th element is kept.  Pairs are (x, y), the padding is
(left, right, top, bottom), as in the StyleGAN sources.

Kernels work it out in polyphase form (Crochiere & Rabiner 1981): an output meets only every ``up``-th tap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusegen.kernels.op import Cost, Op, Tolerance, is_channels_last, register
from fusegen.kernels.upfirdn2d_cases import CASES, SPELLINGS, draw

SCHEMA = (
    "(Tensor x, Tensor? filter, int[2] up=1, int[2] down=1, int[4] padding=0, bool flip_filter=False,"
    " float gain=1.0) -> Tensor"
)


@dataclass(frozen=True)
class Axis:
    """Resampling along one axis.  ``taps`` of the filter; ``size`` in and ``out``; ``before`` zeros put in front."""

    size: int
    out: int
    up: int
    down: int
    before: int
    taps: int


def axis(op: str, name: str, size: int, up: int, down: int, before: int, after: int, taps: int) -> Axis:
    """One axis, checked; raises ValueError where a factor is below 1 or the filter is longer than what it filters."""
    if up < 1 or down < 1:
        raise ValueError(f"{op}: up {up} and down {down} along {name} must be at least 1")
    room = size * up + before + after
    if taps < 1 or room < taps:
        raise ValueError(f"{op}: a filter of {taps} taps along {name} does not fit the {room} elements it is to filter")
    return Axis(size, (room - taps) // down + 1, up, down, before, taps)


def check_filter(op: str, name: str, given: Tensor | None) -> tuple[int, int]:
    """The taps of a filter along x and y; raises ValueError where it is neither one- nor two-dimensional."""
    if given is None:
        return 1, 1
    if given.dim() not in (1, 2):
        raise ValueError(f"{op}: {name} has shape {tuple(given.shape)}; it is (taps,) or (taps y, taps x)")
    return given.shape[-1], given.shape[0]


def axes(
    x: Tensor,
    filter: Tensor | None,
    up: Sequence[int] = (1, 1),
    down: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    *rest: Any,
) -> tuple[Axis, Axis]:
    """The axes x and y of an application; raises ValueError where the arguments do not fit."""
    if x.dim() != 4:
        raise ValueError(f"upfirdn2d: x has shape {tuple(x.shape)}; it is (batch, channels, height, width)")
    taps = check_filter("upfirdn2d", "the filter", filter)
    left, right, top, bottom = padding
    return (
        axis("upfirdn2d", "x", x.shape[3], up[0], down[0], left, right, taps[0]),
        axis("upfirdn2d", "y", x.shape[2], up[1], down[1], top, bottom, taps[1]),
    )


def allocate(x: Tensor, filter: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """The uninitialised output (B, C, out y, out x), channels-last where x is, else contiguous; raises as axes."""
    along_x, along_y = axes(x, filter, *rest)
    shape = (*x.shape[:2], along_y.out, along_x.out)
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return (torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout),)


def reference(
    x: Tensor,
    filter: Tensor | None,
    up: Sequence[int] = (1, 1),
    down: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """By the definition, zeros inserted and multiplied, in float32, or float64 where x is.

    A one-dimensional filter is applied along both axes; ``flip_filter``: correlation instead of convolution; ``gain``
    scales the result.
    """
    (out,) = allocate(x, filter, up, down, padding)
    wide = torch.promote_types(x.dtype, torch.float32)
    return out.copy_(resampled(x.to(wide), filter, up, down, padding, flip_filter, gain))


def resampled(
    x: Tensor, filter: Tensor | None, up: Any, down: Any, padding: Any, flip_filter: bool, gain: float
) -> Tensor:
    """:func:`reference` in x's own dtype, in the memory order that the operators give."""
    f = x.new_ones(1, 1) if filter is None else filter.to(x.dtype)
    f = f if flip_filter else f.flip(*range(f.dim()))
    passes = [(f * gain, tuple(down))] if f.dim() == 2 else [(f[None] * gain, (down[0], 1)), (f[:, None], (1, down[1]))]
    batch, channels, height, width = x.shape
    y = F.pad(x.reshape(batch, channels, height, 1, width, 1), (0, up[0] - 1, 0, 0, 0, up[1] - 1))
    y = F.pad(y.reshape(batch * channels, 1, height * up[1], width * up[0]), [max(p, 0) for p in padding])
    y = F.pad(y, [min(p, 0) for p in padding])  # last: more may be taken away on one side than x itself has
    # Some planes at a time: in float64 PyTorch's convolution copies its input once for every tap.
    for taps, (across, downward) in passes:
        some = max(1, 2**27 // max(1, y[0].numel() * taps.numel() if len(y) else 1))
        y = torch.cat([F.conv2d(part, taps[None, None], stride=(downward, across)) for part in y.split(some)])
    return y.reshape(batch, channels, *y.shape[2:])


def cost(x: Tensor, filter: Tensor | None, *args: Any) -> Cost:
    """Two operations for each tap that an output meets (a separable filter's along x, then along y, the rows between
    counted once); x read and the output written once."""
    along_x, along_y = axes(x, filter, *args)
    outputs = x.shape[0] * x.shape[1] * along_x.out * along_y.out
    meets = [-(-a.taps // a.up) for a in (along_x, along_y)]
    if filter is not None and filter.dim() == 1:
        between = x.shape[0] * x.shape[1] * x.shape[2] * along_x.out
        flops = 2 * (between * meets[0] + outputs * meets[1])
    else:
        flops = 2 * outputs * math.prod(meets)
    filter_bytes = 0 if filter is None else filter.numel() * filter.element_size()
    return Cost(flops=flops, bytes=(x.numel() + outputs) * x.element_size() + filter_bytes)


def _eager(x: Tensor, filter: Any, up: Any, down: Any, padding: Any, flip: bool, gain: float) -> Tensor:
    """As StyleGAN's own sources do without their CUDA extension: zeros inserted, grouped convolutions."""
    batch, channels, height, width = x.shape
    y = F.pad(x.reshape(batch, channels, height, 1, width, 1), (0, up[0] - 1, 0, 0, 0, up[1] - 1))
    y = F.pad(y.reshape(batch, channels, height * up[1], width * up[0]), tuple(padding))
    f = torch.ones(1, 1) if filter is None else filter
    f = (f * gain ** (f.dim() / 2)).to(x.dtype)
    f = f if flip else f.flip(tuple(range(f.dim())))
    if f.dim() == 2:
        y = F.conv2d(y, f.expand(channels, 1, -1, -1), groups=channels)
    else:
        y = F.conv2d(y, f[None, :].expand(channels, 1, -1, -1), groups=channels)
        y = F.conv2d(y, f[:, None].expand(channels, 1, -1, -1), groups=channels)
    return y[:, :, :: down[1], :: down[0]]


OP = register(
    Op(
        name="upfirdn2d",
        formula="downsample(filter(pad(upsample(x)))), upsampling by zeros",
        source="Karras et al. 2020, arXiv:1912.04958; the official code's upfirdn2d",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={
            torch.float32: Tolerance(rms=1e-6, peak=2e-6),
            torch.bfloat16: Tolerance(rms=4e-3, peak=4.2e-3),
            torch.float16: Tolerance(rms=5e-4, peak=5.2e-4),
        },
        cases=CASES,
        spellings=SPELLINGS,
        eager=_eager,
        draw=draw,
    )
)
