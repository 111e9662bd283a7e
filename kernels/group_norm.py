"""Group normalization with an optional SiLU (Wu & He 2018; Hendrycks & Gimpel 2016).

Each sample's channels are split into ``num_groups`` runs of ``C / num_groups``; every run is normalized by its own
mean and (biased) variance over channels and pixels, scaled and shifted per channel, then activated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.op import Case, Cost, Op, Spelling, Tolerance, register

ACTIVATIONS = ("none", "silu")
SCHEMA = (
    "(Tensor x, int num_groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-5,"
    ' str activation="none") -> Tensor'
)


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` (B, C, H, W) is dense with channels innermost; what is also contiguous counts as contiguous."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def allocate(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> tuple[Tensor, ...]:
    """The uninitialised output: of x's shape and dtype, channels-last where x is, else contiguous.

    Raises ValueError where the channels do not divide into the groups or the activation is not known.
    """
    if x.dim() < 2 or num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(
            f"group_norm: x of shape {tuple(x.shape)} does not divide into {num_groups} groups of channels"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"group_norm: no activation is called {activation!r}; there are {', '.join(ACTIVATIONS)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tuple(tensor.shape) != (x.shape[1],):
            raise ValueError(f"group_norm: {name} has shape {tuple(tensor.shape)}, x has {x.shape[1]} channels")
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout),)


def reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """Group normalization of x (B, C, *) in float32, or float64 where x is; statistics by two passes."""
    (out,) = allocate(x, num_groups, weight, bias, eps, activation)
    wide = torch.promote_types(x.dtype, torch.float32)
    grouped = x.to(wide).reshape(x.shape[0], num_groups, x.shape[1] // num_groups, math.prod(x.shape[2:]))
    centred = grouped - grouped.mean((2, 3), keepdim=True)
    centred = centred - centred.mean((2, 3), keepdim=True)  # the rounding of a mean far above the deviation
    y = centred * torch.rsqrt(centred.square().mean((2, 3), keepdim=True) + eps)
    y = y.reshape(x.shape)
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    if weight is not None:
        y = y * weight.to(wide).reshape(per_channel)
    if bias is not None:
        y = y + bias.to(wide).reshape(per_channel)
    return out.copy_(F.silu(y) if activation == "silu" else y)


def cost(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
) -> Cost:
    """Five operations an element (sum, centred square, scale, shift), four more for SiLU; x read, y written once."""
    parameters = sum(t.numel() * t.element_size() for t in (weight, bias) if t is not None)
    each = 9 if activation == "silu" else 5
    return Cost(flops=each * x.numel(), bytes=2 * x.numel() * x.element_size() + parameters)


def _case(
    name: str,
    shape: tuple[int, ...],
    groups: int,
    *,
    layout: str = "contiguous",
    parameters: str = "same",
    mean: float = 0.0,
    activation: str = "silu",
    bench: bool = False,
    small: bool = False,
) -> Case:
    """``layout``: contiguous, channels_last, strided (every other pixel) or unaligned (one element into a buffer).

    ``parameters``: the dtype of weight and bias, "same" as x or "fp32", "bias" for a bias alone, or "no".
    """

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        if layout == "strided":
            x = (torch.randn(*shape[:-1], 2 * shape[-1], generator=g) + mean).to(dtype)[..., ::2]
        else:
            x = (torch.randn(shape, generator=g) + mean).to(dtype)
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        if layout == "unaligned":
            x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
        own = torch.float32 if parameters == "fp32" else dtype
        weight = (1 + 0.3 * torch.randn(shape[1], generator=g)).to(own) if parameters in ("same", "fp32") else None
        bias = (0.3 * torch.randn(shape[1], generator=g)).to(own) if parameters != "no" else None
        return (x, groups, weight, bias, 1e-5, activation)

    return Case(name, build, bench=bench, small=small)


def _bench(shape: tuple[int, ...], groups: int = 32) -> list[Case]:
    name = "x".join(map(str, shape))
    return [
        _case(name, shape, groups, bench=True),
        _case(f"{name} channels-last", shape, groups, layout="channels_last", bench=True),
    ]


CASES = [
    _case("small", (2, 8, 4, 4), 4, small=True),
    _case("no activation", (2, 8, 4, 4), 4, activation="none", small=True),
    _case("channels-last", (2, 12, 5, 7), 3, layout="channels_last", small=True),
    _case("no batch", (0, 8, 4, 4), 2, small=True),
    _case("no pixels", (2, 8, 0, 4), 2, small=True),
    _case("one element", (1, 1, 1, 1), 1, small=True),
    _case("one pixel", (3, 64, 1, 1), 8, small=True),
    _case("prime sizes", (3, 21, 13, 11), 7, small=True),
    _case("prime sizes channels-last", (3, 21, 13, 11), 7, layout="channels_last", small=True),
    _case("prime group channels-last", (2, 34, 9, 19), 2, layout="channels_last", small=True),
    _case("one group", (2, 20, 17, 5), 1, small=True),
    _case("one group channels-last", (2, 20, 17, 5), 1, layout="channels_last", small=True),
    _case("groups are channels", (2, 33, 9, 8), 33, small=True),
    _case("groups are channels, channels-last", (2, 33, 9, 8), 33, layout="channels_last", small=True),
    _case("mean far above deviation", (2, 16, 16, 16), 4, mean=64.0, activation="none", small=True),
    _case("mean far above deviation, channels-last", (2, 16, 16, 16), 4, layout="channels_last", mean=64.0),
    _case("no parameters", (2, 12, 7, 9), 4, parameters="no", small=True),
    _case("bias alone", (2, 12, 7, 9), 4, parameters="bias", small=True),
    _case("float32 parameters", (2, 12, 7, 9), 4, parameters="fp32", small=True),
    _case("float32 parameters, channels-last", (2, 36, 7, 9), 4, parameters="fp32", layout="channels_last", small=True),
    _case("strided", (2, 12, 7, 9), 4, layout="strided", small=True),
    _case("unaligned", (2, 12, 7, 9), 4, layout="unaligned", small=True),
    _case("two dimensions", (5, 24), 6, small=True),
    _case("three dimensions", (2, 24, 37), 6, small=True),
    _case("five dimensions", (2, 16, 3, 5, 7), 4, small=True),
    _case("large, one sample", (1, 64, 96, 80), 32),
    _case("large, one sample channels-last", (1, 64, 96, 80), 32, layout="channels_last"),
    _case("a group larger than the cache", (1, 8, 256, 161), 1),
    _case("a group larger than the cache, channels-last", (1, 8, 256, 161), 1, layout="channels_last"),
    _case("a group wider than a tile, channels-last", (1, 600, 37, 5), 2, layout="channels_last"),
    *_bench((2, 320, 64, 64)),
    *_bench((2, 640, 32, 32)),
    *_bench((2, 1280, 16, 16)),
    *_bench((2, 960, 64, 64)),
    *_bench((1, 128, 256, 256)),
    *_bench((16, 64, 32, 32)),
    *_bench((16, 160, 8, 8)),
]


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


def _with(activation: str) -> Any:
    def call(**captures: Any) -> Mapping[str, Any]:
        return {**captures, "activation": activation}

    return call


_PLAIN_INPUT = (2, 6, 5, 5)
SPELLINGS = [
    Spelling("silu(group_norm)", _affine_silu, lambda: _small(_PLAIN_INPUT, (6,), (6,)), _with("silu")),
    Spelling("y*sigmoid(y) of group_norm", _affine_sigmoid, lambda: _small(_PLAIN_INPUT, (6,), (6,)), _with("silu")),
    Spelling("silu(group_norm without affine)", _plain_silu, lambda: _small(_PLAIN_INPUT), _with("silu")),
    Spelling("y*sigmoid(y) of group_norm without affine", _plain_sigmoid, lambda: _small(_PLAIN_INPUT), _with("silu")),
    Spelling("group_norm", _affine, lambda: _small(_PLAIN_INPUT, (6,), (6,)), _with("none")),
    Spelling("group_norm without affine", _plain, lambda: _small(_PLAIN_INPUT), _with("none")),
]


def _eager(x: Tensor, groups: int, weight: Any, bias: Any, eps: float, activation: str) -> Tensor:
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if activation == "silu" else y


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    groups, width, own = draw.integer(1, 9), draw.integer(1, 40), (dtype, torch.float32)
    shape = (draw.integer(0, 3), groups * width, *draw.shape(*[23] * draw.integer(0, 3)))
    x = draw.tensor(shape, dtype, mean=draw.choice((0.0, 8.0)))
    weight, bias = draw.maybe(shape[1:2], own), draw.maybe(shape[1:2], own)
    return (x, groups, weight, bias, draw.choice((1e-5, 1e-6)), draw.choice(("none", "silu")))


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
        draw=_draw,
        formula="(x - mean) / sqrt(variance + eps) * weight + bias over each group of channels, then SiLU if asked",
        source="Wu & He 2018, arXiv:1803.08494",
    )
)
