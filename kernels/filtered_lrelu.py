"""StyleGAN3's nonlinearity: upsample, leaky ReLU, downsample (Karras et al. 2021, "Alias-Free Generative Adversarial
Networks"), without the upsampled picture in memory.

Every channel of x (B, C, H, W) by itself: the channel's bias is added, up - 1 zeros are inserted after each element,
``padding`` zeros are put around (or elements taken away), the result is convolved with ``up_filter``, multiplied by
gain up^2, goes through a leaky ReLU, is clamped to [-clamp, clamp], convolved with ``down_filter``, and every
``down``-th element is kept.  A one-dimensional filter is applied along both axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusegen.kernels import upfirdn2d
from fusegen.kernels.filtered_lrelu_cases import CASES, draw
from fusegen.kernels.op import Cost, Op, Spelling, Tolerance, is_channels_last, register
from fusegen.kernels.upfirdn2d import Axis, axis, check_filter, resampled

SCHEMA = (
    "(Tensor x, Tensor? up_filter=None, Tensor? down_filter=None, Tensor? bias=None, int up=1, int down=1,"
    " int[4] padding=0, float gain=1.4142135623730951, float slope=0.2, float? clamp=None, bool flip_filter=False)"
    " -> Tensor"
)


def axes(
    x: Tensor,
    up_filter: Tensor | None,
    down_filter: Tensor | None,
    bias: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
) -> tuple[tuple[Axis, Axis], tuple[Axis, Axis]]:
    """The axes x and y, each of the upsampling and the downsampling; raises ValueError where arguments do not fit."""
    if x.dim() != 4:
        raise ValueError(f"filtered_lrelu: x has shape {tuple(x.shape)}; it is (batch, channels, height, width)")
    if bias is not None and tuple(bias.shape) != (x.shape[1],):
        raise ValueError(f"filtered_lrelu: bias has shape {tuple(bias.shape)}, x has {x.shape[1]} channels")
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"filtered_lrelu: the clamp {clamp} is negative")
    first = check_filter("filtered_lrelu", "up_filter", up_filter)
    second = check_filter("filtered_lrelu", "down_filter", down_filter)
    found = []
    for i, (name, size) in enumerate((("x", x.shape[3]), ("y", x.shape[2]))):
        rise = axis("filtered_lrelu", name, size, up, 1, padding[2 * i], padding[2 * i + 1], first[i])
        found.append((rise, axis("filtered_lrelu", name, rise.out, 1, down, 0, 0, second[i])))
    return found[0], found[1]


def allocate(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The uninitialised output (B, C, out y, out x), channels-last where x is, else contiguous; raises as axes."""
    (_, along_x), (_, along_y) = axes(x, *(*rest, None, None)[: max(2, len(rest))])
    shape = (*x.shape[:2], along_y.out, along_x.out)
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return (torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout),)


def reference(
    x: Tensor,
    up_filter: Tensor | None = None,
    down_filter: Tensor | None = None,
    bias: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
) -> Tensor:
    """By the definition, every step in full, in float32, or float64 where x is."""
    (out,) = allocate(x, up_filter, down_filter, bias, up, down, padding, gain, slope, clamp)
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        y = y + bias.to(y.dtype).reshape(1, -1, 1, 1)
    y = resampled(y, up_filter, (up, up), (1, 1), padding, flip_filter, float(up * up))
    y = F.leaky_relu(y, slope) * gain
    if clamp is not None:
        y = y.clamp(-clamp, clamp)
    return out.copy_(resampled(y, down_filter, (1, 1), (down, down), (0, 0, 0, 0), flip_filter, 1.0))


def _taps_cost(along: tuple[Axis, Axis], filter: Tensor | None, planes: int) -> int:
    """Operations of one resampling, as :func:`.upfirdn2d.cost` counts them."""
    ax, ay = along
    meets = [-(-a.taps // a.up) for a in along]
    if filter is not None and filter.dim() == 1:
        return 2 * planes * ax.out * (ay.size * meets[0] + ay.out * meets[1])
    return 2 * planes * ax.out * ay.out * math.prod(meets)


def cost(x: Tensor, up_filter: Tensor | None = None, down_filter: Tensor | None = None, *rest: Any) -> Cost:
    """Both resamplings and three operations for each element between them; x read and the output written once."""
    (rise_x, fall_x), (rise_y, fall_y) = axes(x, up_filter, down_filter, *rest)
    planes = x.shape[0] * x.shape[1]
    between = 3 * planes * rise_x.out * rise_y.out
    flops = _taps_cost((rise_x, rise_y), up_filter, planes) + _taps_cost((fall_x, fall_y), down_filter, planes)
    given = (up_filter, down_filter, *rest[:1])
    parameters = sum(t.numel() * t.element_size() for t in given if t is not None)
    return Cost(flops + between, (x.numel() + planes * fall_x.out * fall_y.out) * x.element_size() + parameters)


def _eager(
    x: Tensor, up_filter: Any, down_filter: Any, bias: Any, up: int, down: int, padding: Any, gain: float,
    slope: float, clamp: Any, flip: bool,
) -> Tensor:  # fmt: skip
    """As StyleGAN3's own sources do without their CUDA extension."""
    if bias is not None:
        x = x + bias.to(x.dtype).reshape(1, -1, 1, 1)
    y = upfirdn2d._eager(x, up_filter, (up, up), (1, 1), padding, flip, float(up * up))
    y = F.leaky_relu(y, slope) * gain
    y = y if clamp is None else y.clamp(-clamp, clamp)
    return upfirdn2d._eager(y, down_filter, (1, 1), (down, down), (0, 0, 0, 0), flip, 1.0)


def _correlated(
    x: Tensor, up_filter: Tensor, down_filter: Tensor, *, up: Any = (3, 3), padding: Any = (4, 5, 6, 7),
    up_gain: float = 9.5, slope: Any = 0.15, gain: Any = 1.3, clamp: Any = 2.6, down: Any = (2, 2),
) -> Tensor:  # fmt: skip
    y = torch.ops.fusegen.upfirdn2d(x, up_filter, up, (1, 1), padding, True, up_gain)
    y = torch.ops.fusegen.bias_act(y, None, 1, "lrelu", slope, gain, clamp)
    return torch.ops.fusegen.upfirdn2d(y, down_filter, (1, 1), down, (0, 0, 0, 0), True)


def _correlated_bias(
    x: Tensor, bias: Tensor, up_filter: Tensor, down_filter: Tensor, *, up: Any = (3, 3), padding: Any = (4, 5, 6, 7),
    up_gain: float = 9.5, slope: Any = 0.15, gain: Any = 1.3, clamp: Any = 2.6, down: Any = (2, 2),
) -> Tensor:  # fmt: skip
    x = x + bias.reshape(1, -1, 1, 1)
    y = torch.ops.fusegen.upfirdn2d(x, up_filter, up, (1, 1), padding, True, up_gain)
    y = torch.ops.fusegen.bias_act(y, None, 1, "lrelu", slope, gain, clamp)
    return torch.ops.fusegen.upfirdn2d(y, down_filter, (1, 1), down, (0, 0, 0, 0), True)


def _call(
    x: Any, up_filter: Any, down_filter: Any, up: Any, padding: Any, up_gain: float, slope: Any, gain: Any, clamp: Any,
    down: Any, bias: Any = None,
) -> Mapping[str, Any] | str:  # fmt: skip
    """One factor for both axes; the upsampling's own gain goes through the leaky ReLU into the gain after it."""
    if up[0] != up[1] or down[0] != down[1]:
        return f"it resamples by {up} and {down}, not alike along both axes"
    if up_gain <= 0:
        return f"a gain of {up_gain} before the leaky ReLU cannot be taken after it"
    after = (math.sqrt(2) if gain is None else gain) * up_gain / up[0] ** 2
    return {
        "x": x, "up_filter": up_filter, "down_filter": down_filter, "bias": bias, "up": up[0], "down": down[0],
        "padding": padding, "gain": after, "slope": 0.2 if slope is None else slope, "clamp": clamp,
        "flip_filter": True,
    }  # fmt: skip


_X, _F = (2, 6, 9, 9), (4, 4)
SPELLINGS = [
    Spelling(
        "resampled lrelu of x + bias",
        _correlated_bias,
        lambda: (torch.zeros(_X), torch.zeros(6), torch.zeros(_F), torch.zeros(_F)),
        _call,
    ),
    Spelling(
        "resampled lrelu",
        _correlated,
        lambda: (torch.zeros(_X), torch.zeros(_F), torch.zeros(_F)),
        _call,
    ),
]


OP = register(
    Op(
        name="filtered_lrelu",
        formula="downsample(filter(clamp(gain lrelu(filter(upsample(x + bias))))))",
        source="Karras et al. 2021, arXiv:2106.12423, appendix D",
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
        spellings=SPELLINGS,
        eager=_eager,
        draw=draw,
    )
)
