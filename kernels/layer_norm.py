"""Layer normalization over the last dimension (Ba, Kiros & Hinton 2016)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.op import Case, Cost, Op, Spelling, Tolerance, register

SCHEMA = "(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-5) -> Tensor"


def allocate(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, ...]:
    """The uninitialised output: of x's shape and dtype, contiguous.  Raises ValueError where parameters do not fit."""
    if x.dim() < 1:
        raise ValueError("layer_norm: x has no dimension to normalize")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tuple(tensor.shape) != (x.shape[-1],):
            raise ValueError(f"layer_norm: {name} has shape {tuple(tensor.shape)}, x's last dimension is {x.shape[-1]}")
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),)


def reference(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer normalization of x (*, C) in float32, or float64 where x is; statistics by two passes."""
    (out,) = allocate(x, weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)  # the rounding of a mean far above the deviation
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return out.copy_(y)


def cost(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Cost:
    """Five operations an element (sum, centred square, scale and shift); x read and the output written once."""
    parameters = sum(t.numel() * t.element_size() for t in (weight, bias) if t is not None)
    return Cost(flops=5 * x.numel(), bytes=2 * x.numel() * x.element_size() + parameters)


def _case(
    name: str,
    shape: tuple[int, ...],
    *,
    layout: str = "contiguous",
    parameters: str = "same",
    mean: float = 0.0,
    bench: bool = False,
    small: bool = True,
) -> Case:
    """``layout``: contiguous, rows (padded rows), transposed (the first two dimensions swapped), strided (every other
    element of the last dimension) or unaligned.  ``parameters``: "same" dtype as x, "fp32", "bias" alone, or "no".
    """

    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        width = shape[-1]
        full = {"rows": width + 5, "strided": 2 * width}.get(layout, width)
        lead = (shape[1], shape[0], *shape[2:-1]) if layout == "transposed" else shape[:-1]
        x = (torch.randn(*lead, full, generator=g) + mean).to(dtype)
        if layout == "rows":
            x = x[..., :width]
        elif layout == "strided":
            x = x[..., ::2]
        elif layout == "transposed":
            x = x.transpose(0, 1)
        elif layout == "unaligned":
            x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
        own = torch.float32 if parameters == "fp32" else dtype
        weight = (1 + 0.3 * torch.randn(width, generator=g)).to(own) if parameters in ("same", "fp32") else None
        bias = (0.3 * torch.randn(width, generator=g)).to(own) if parameters != "no" else None
        return (x, weight, bias, 1e-5)

    return Case(name, build, bench=bench, small=small)


def _bench(*shape: int) -> Case:
    return _case("x".join(map(str, shape)), shape, bench=True, small=False)


CASES = [
    _case("small", (3, 5, 16)),
    _case("no rows", (0, 7, 16)),
    _case("no width", (3, 0)),
    _case("width 1", (5, 1)),
    _case("one row", (48,)),
    _case("odd width", (7, 33)),
    _case("prime width", (5, 3, 509)),
    _case("width 15", (9, 15)),
    _case("wide row", (3, 5003)),
    _case("mean far above deviation", (6, 257), mean=64.0),
    _case("no parameters", (4, 40), parameters="no"),
    _case("bias alone", (4, 40), parameters="bias"),
    _case("float32 parameters", (4, 40), parameters="fp32"),
    _case("padded rows", (3, 4, 35), layout="rows"),
    _case("transposed", (3, 4, 35), layout="transposed"),
    _case("strided", (4, 40), layout="strided"),
    _case("unaligned", (4, 40), layout="unaligned"),
    _bench(2, 4096, 320),
    _bench(2, 1024, 640),
    _bench(2, 256, 1280),
    _bench(16, 64, 160),
    _bench(2, 77, 768),
]


def _affine(
    x: Tensor, weight: Tensor, bias: Tensor, *, normalized_shape: tuple[int, ...] = (6,), eps: float = 3e-5
) -> Tensor:
    return F.layer_norm(x, normalized_shape, weight, bias, eps)


def _plain(x: Tensor, *, normalized_shape: tuple[int, ...] = (6,), eps: float = 3e-5) -> Tensor:
    return F.layer_norm(x, normalized_shape, None, None, eps)


def _variance(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 3e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + eps) * weight + bias


def _mean_square(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 3e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * weight + bias


def _call(normalized_shape: tuple[int, ...] = (1,), **captures: Any) -> Mapping[str, Any] | str:
    if len(normalized_shape) != 1:
        return f"it normalizes over the last {len(normalized_shape)} dimensions"
    return captures


def _inputs() -> tuple[Tensor, ...]:
    return torch.zeros(4, 6), torch.zeros(6), torch.zeros(6)


SPELLINGS = [
    Spelling("layer_norm", _affine, _inputs, _call),
    Spelling("layer_norm without affine", _plain, lambda: (torch.zeros(4, 6),), _call),
    Spelling("mean and var", _variance, _inputs, _call),
    Spelling("mean and mean square", _mean_square, _inputs, _call),
]


def _eager(x: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    width, own = draw.integer(0, 700), (dtype, torch.float32)
    x = draw.tensor((*draw.shape(5, *[5] * draw.integer(0, 2)), width), dtype, mean=draw.choice((0.0, 8.0)))
    return (x, draw.maybe((width,), own), draw.maybe((width,), own), 1e-5)


OP = register(
    Op(
        name="layer_norm",
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
        formula="(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension",
        source="Ba, Kiros & Hinton 2016, arXiv:1607.06450",
    )
)
