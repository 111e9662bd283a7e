"""Group normalization with an optional SiLU (Wu & He 2018; Hendrycks & Gimpel 2016).

Each sample's channels are split into ``num_groups`` runs of ``C / num_groups``; every run is normalized by its own
mean and (biased) variance over channels and pixels, scaled and shifted per channel, then activated.

``add``, one value a sample and channel, is added to x first: the time embedding of a residual block, where nothing else
reads the sum.  ``scale`` and ``shift``, of the same shape, modulate the result before its activation by
y * (1 + scale) + shift (Dhariwal & Nichol 2021, adaptive group normalization).

``moments``, float64 (B, 2, C), are the mean and (biased) variance of each channel of x over its pixels, where whoever
made x left them (:mod:`.channel_moments`): the statistics of a run are then those of its channels together
(Chan, Golub & LeVeque 1979), and x is read once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.group_norm_cases import CASES, moments_of
from fusegen.kernels.op import Cost, Op, Spelling, Tolerance, is_channels_last, is_last, register
from fusegen.kernels.rows import alone, size_of

ACTIVATIONS = ("none", "silu")
SCHEMA = (
    "(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-5,"
    ' str activation="none", Tensor? add=None, Tensor? scale=None, Tensor? shift=None, Tensor? moments=None) -> Tensor'
)


def per_channel(tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor`` (B, C) or (B, C, 1, ...), B possibly 1, as a view (x's batch, C)."""
    return tensor.reshape(tensor.shape[:2]).expand(x.shape[:2])


def fits(shape: Sequence[Any], x: Sequence[Any]) -> bool:
    """Whether a tensor of that shape can be added to, or modulate, x (B, C, *); sizes may be symbols' names."""
    batch_and_channel = len(shape) >= 2 and shape[0] in (1, x[0]) and shape[1] == x[1]
    return batch_and_channel and len(shape) in (2, len(x)) and all(n == 1 for n in shape[2:])


def check(op: str, x: Tensor, channels: int, num_groups: int, activation: str, **parameters: Tensor | None) -> None:
    """Raises ValueError where the channels do not divide, the activation is unknown or a parameter is not (C,)."""
    if x.dim() < 2 or num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: {channels} channels do not divide into {num_groups} groups")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: no activation is called {activation!r}; there are {', '.join(ACTIVATIONS)}")
    for name, tensor in parameters.items():
        if tensor is not None and tuple(tensor.shape) != (channels,):
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, there are {channels} channels")


def like(x: Tensor, channels: int) -> Tensor:
    """An uninitialised tensor like x of that many channels: channels innermost where x's are, else contiguous."""
    if x.dim() == 3 and is_last(x):
        return torch.empty((x.shape[0], x.shape[2], channels), dtype=x.dtype, device=x.device).transpose(1, 2)
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def check_moments(op: str, x: Tensor, moments: Tensor | None) -> None:
    """Raises ValueError where they are not such of x (B, C, ...)."""
    if moments is not None and (moments.dtype, tuple(moments.shape)) != (torch.float64, (x.shape[0], 2, x.shape[1])):
        raise ValueError(
            f"{op}: moments are {moments.dtype} {tuple(moments.shape)}, not {torch.float64} (B, 2, C) of x"
        )


def allocate(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    moments: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The uninitialised output: of x's shape and dtype, channels innermost where x's are, else contiguous.

    Raises ValueError where the channels do not divide into the groups, the activation is not known or a shape is wrong.
    """
    check("group_norm", x, x.shape[1] if x.dim() > 1 else 0, num_groups, activation, weight=weight, bias=bias)
    for name, tensor in (("add", add), ("scale", scale), ("shift", shift)):
        if tensor is not None and not fits(tensor.shape, x.shape):
            raise ValueError(f"group_norm: {name} of shape {tuple(tensor.shape)} does not go with x {tuple(x.shape)}")
    check_moments("group_norm", x, moments)
    return (like(x, x.shape[1]),)


def reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    moments: Tensor | None = None,
) -> Tensor:
    """Group normalization of x (B, C, *) in float32, or float64 where x is; statistics by two passes."""
    (out,) = allocate(x, num_groups, weight, bias, eps, activation, add, scale, shift, moments)
    wide = torch.promote_types(x.dtype, torch.float32)
    ones = (1,) * (x.dim() - 2)

    def spread(tensor: Tensor) -> Tensor:
        return per_channel(tensor, x).to(wide).reshape(*x.shape[:2], *ones)

    joined = x.to(wide) if add is None else x.to(wide) + spread(add)
    grouped = joined.reshape(x.shape[0], num_groups, x.shape[1] // num_groups, math.prod(x.shape[2:]))
    if moments is None:
        centred = grouped - grouped.mean((2, 3), keepdim=True)
        centred = centred - centred.mean((2, 3), keepdim=True)  # the rounding of a mean far above the deviation
        variance = centred.square().mean((2, 3), keepdim=True)
    else:
        mean, variance = _together(moments, num_groups, None if add is None else per_channel(add, x))
        centred, variance = (grouped - mean).to(wide), variance.to(wide)
    y = (centred * torch.rsqrt(variance + eps)).reshape(x.shape)
    if weight is not None:
        y = y * spread(weight[None])
    if bias is not None:
        y = y + spread(bias[None])
    y = y if scale is None else y * (1 + spread(scale))
    y = y if shift is None else y + spread(shift)
    return out.copy_(F.silu(y) if activation == "silu" else y)


def _together(moments: Tensor, num_groups: int, add: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, G, 1, 1) of each group by those of its channels, with ``add`` (B, C) added, in float64."""
    means, variances = moments.unbind(1)
    means = means if add is None else means + add
    means, variances = (t.unflatten(1, (num_groups, -1))[..., None] for t in (means, variances))
    mean = means.mean(2, keepdim=True)
    return mean, (variances + (means - mean).square()).mean(2, keepdim=True)


def cost(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    moments: Tensor | None = None,
) -> Cost:
    """Five operations an element (sum, centred square, scale, shift), four more for SiLU; x read, y written once.

    What is added or modulates has one value a channel: it can be folded into the statistics and the parameters.
    """
    each = 9 if activation == "silu" else 5
    return Cost(flops=each * x.numel(), bytes=size_of(x, x, weight, bias, add, scale, shift, moments))


def _small(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(s) for s in shapes)


def _affine(x: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int = 3, eps: float = 3e-5) -> Tensor:
    return F.group_norm(x, num_groups, weight, bias, eps)


def _plain(x: Tensor, *, num_groups: int = 3, eps: float = 3e-5) -> Tensor:
    return F.group_norm(x, num_groups, None, None, eps)


def _affine_silu(x: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int = 3, eps: float = 3e-5) -> Tensor:
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))


def _plain_silu(x: Tensor, *, num_groups: int = 3, eps: float = 3e-5) -> Tensor:
    return F.silu(F.group_norm(x, num_groups, None, None, eps))


def _affine_sigmoid(x: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int = 3, eps: float = 3e-5) -> Tensor:
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return y * torch.sigmoid(y)


def _plain_sigmoid(x: Tensor, *, num_groups: int = 3, eps: float = 3e-5) -> Tensor:
    y = F.group_norm(x, num_groups, None, None, eps)
    return y * torch.sigmoid(y)


def _added(x: Tensor, time: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int = 6, eps: float = 3e-5) -> Tensor:
    return F.group_norm(x + time[:, :, None, None], num_groups, weight, bias, eps)


def _added_silu(
    x: Tensor, time: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int = 6, eps: float = 3e-5
) -> Tensor:
    return F.silu(F.group_norm(x + time[:, :, None, None], num_groups, weight, bias, eps))


def _added_sigmoid(
    x: Tensor, time: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int = 6, eps: float = 3e-5
) -> Tensor:
    y = F.group_norm(x + time[:, :, None, None], num_groups, weight, bias, eps)
    return y * torch.sigmoid(y)


def _modulated_silu(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, *, num_groups: int = 6, eps: float = 3e-5
) -> Tensor:
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps) * (1 + scale) + shift)


def _with(activation: str) -> Any:
    def call(x: Any, time: Any = None, **captures: Any) -> Mapping[str, Any] | str:
        for what, one in (("added", time), ("scale", captures.get("scale")), ("shift", captures.get("shift"))):
            if one is not None and (x.shape is None or not fits(one.shape or (), x.shape)):
                return f"what is {what} of shape {one.shape} is not one value a sample and channel of {x.shape}"
        return {"x": x, "add": time, **captures, "activation": activation}

    return call


_PLAIN_INPUT, _CHANNEL, _PIXEL = (2, 6, 5, 5), (2, 6), (2, 6, 1, 1)
SPELLINGS = [
    Spelling("silu(group_norm(x + t))", _added_silu, lambda: _small(_PLAIN_INPUT, _CHANNEL, (6,), (6,)), _with("silu")),
    Spelling(
        "y*sigmoid(y) of group_norm(x + t)",
        _added_sigmoid,
        lambda: _small(_PLAIN_INPUT, _CHANNEL, (6,), (6,)),
        _with("silu"),
    ),
    Spelling("group_norm(x + t)", _added, lambda: _small(_PLAIN_INPUT, _CHANNEL, (6,), (6,)), _with("none")),
    Spelling(
        "silu of a modulated group_norm",
        _modulated_silu,
        lambda: _small(_PLAIN_INPUT, (6,), (6,), _PIXEL, _PIXEL),
        _with("silu"),
    ),
    Spelling("silu(group_norm)", _affine_silu, lambda: _small(_PLAIN_INPUT, (6,), (6,)), _with("silu")),
    Spelling("y*sigmoid(y) of group_norm", _affine_sigmoid, lambda: _small(_PLAIN_INPUT, (6,), (6,)), _with("silu")),
    Spelling("silu(group_norm without affine)", _plain_silu, lambda: _small(_PLAIN_INPUT), _with("silu")),
    Spelling("y*sigmoid(y) of group_norm without affine", _plain_sigmoid, lambda: _small(_PLAIN_INPUT), _with("silu")),
    Spelling("group_norm", _affine, lambda: _small(_PLAIN_INPUT, (6,), (6,)), _with("none")),
    Spelling("group_norm without affine", _plain, lambda: _small(_PLAIN_INPUT), _with("none")),
]


def _eager(
    x: Tensor, groups: int, weight: Any, bias: Any, eps: float, activation: str, add: Any, scale: Any, shift: Any,
    moments: Tensor | None,
) -> Tensor:  # fmt: skip
    ones = (1,) * (x.dim() - 2)
    add, scale, shift = (t if t is None else t.reshape(*t.shape[:2], *ones) for t in (add, scale, shift))
    y = F.group_norm(x if add is None else x + add, groups, weight, bias, eps)
    y = y if scale is None else y * (1 + scale)
    y = y if shift is None else y + shift
    return F.silu(y) if activation == "silu" else y


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    groups, width, own = draw.integer(1, 9), draw.integer(1, 40), (dtype, torch.float32)
    shape = (draw.integer(0, 3), groups * width, *draw.shape(*[23] * draw.integer(0, 3)))
    x, ones = draw.tensor(shape, dtype, mean=draw.choice((0.0, 8.0))), (1,) * (len(shape) - 2)
    weight, bias = draw.maybe(shape[1:2], own), draw.maybe(shape[1:2], own)
    kinds = [draw.choice([None, shape[:2], (1, shape[1]), (*shape[:2], *ones)]) for _ in range(3)]
    more = (k if k is None else draw.dense(k, draw.choice(own), scale=0.3) for k in kinds)
    eps, activation = draw.choice((1e-5, 1e-6)), draw.choice(ACTIVATIONS)
    return (x, groups, weight, bias, eps, activation, *more, moments_of(x) if draw.flag() else None)


OP = register(
    Op(
        name="group_norm",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={
            torch.float32: Tolerance(rms=5e-6, peak=1e-5),
            torch.bfloat16: Tolerance(rms=4e-3, peak=4.2e-3),
            torch.float16: Tolerance(rms=5e-4, peak=5.2e-4),
        },
        cases=CASES,
        spellings=SPELLINGS,
        eager=_eager,
        alone=alone,
        draw=_draw,
        formula="(x + add - mean) / sqrt(variance + eps) * weight + bias over each group of channels, modulated, SiLU",
        source="Wu & He 2018, arXiv:1803.08494",
    )
)
