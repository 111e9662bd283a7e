"""Layer normalization over the last dimension (Ba, Kiros & Hinton 2016), modulated where a scale or shift is given.

y = ((x - mean) / sqrt(variance + eps) * weight + bias) * (1 + scale) + shift.  Scale and shift come from the condition,
one pair a sample: the adaptive layer norm of diffusion transformers (Peebles & Xie 2023); see rows.py for their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.norm_cases import Inputs, bench, cases, drawn_modulation, drawn_shape
from fusegen.kernels.op import Cost, Op, Spelling, Tolerance, register
from fusegen.kernels.rows import alone, check_modulation, check_parameters, finish, modulated, modulates, size_of

SCHEMA = (
    "(Tensor x, Tensor? weight=None, Tensor? bias=None, float eps=1e-5, Tensor? scale=None, Tensor? shift=None)"
    " -> Tensor"
)


def allocate(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The uninitialised output: of x's shape and dtype, contiguous.  Raises ValueError where parameters do not fit."""
    check_parameters("layer_norm", x, weight=weight, bias=bias)
    check_modulation("layer_norm", x, scale=scale, shift=shift)
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),)


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Layer normalization of x (*, C) in float32, or float64 where x is; statistics by two passes."""
    (out,) = allocate(x, weight, bias, eps, scale, shift)
    wide = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)  # the rounding of a mean far above the deviation
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return out.copy_(finish(y, weight, bias, scale, shift))


def cost(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Cost:
    """Five operations an element (sum, centred square, scale and shift), two more where modulated; all moved once."""
    each = 5 + (scale is not None) + (shift is not None)
    return Cost(flops=each * x.numel(), bytes=size_of(x, x, weight, bias, scale, shift))


def _build(inputs: Inputs, g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
    x = inputs.tensor(g, dtype)
    return (x, *inputs.affine(g, dtype), 1e-5, *inputs.modulations(g, dtype, 2))


CASES = cases(
    _build,
    [
        Inputs("mean far above deviation", (6, 257), mean=64.0),
        bench(2, 4096, 320),
        bench(2, 1024, 640),
        bench(2, 256, 1280),
        bench(16, 64, 160),
        bench(2, 77, 768),
        bench(2, 256, 1152, parameters="no", modulation="chunk"),
        bench(2, 4096, 1536, parameters="no", modulation="chunk"),
        bench(1, 4608, 3072, parameters="no", modulation="chunk"),
    ],
)


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


def _modulated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    normalized_shape: tuple[int, ...] = (6,),
    eps: float = 3e-5,
) -> Tensor:
    return F.layer_norm(x, normalized_shape, weight, bias, eps) * (1 + scale) + shift


def _plain_modulated(
    x: Tensor, scale: Tensor, shift: Tensor, *, normalized_shape: tuple[int, ...] = (6,), eps: float = 3e-5
) -> Tensor:
    return F.layer_norm(x, normalized_shape, None, None, eps) * (1 + scale) + shift


def _modulated_later(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    normalized_shape: tuple[int, ...] = (6,),
    eps: float = 3e-5,
) -> Tensor:
    return F.layer_norm(x, normalized_shape, weight, bias, eps) * (1 + scale)[:, None] + shift


def _plain_modulated_later(
    x: Tensor, scale: Tensor, shift: Tensor, *, normalized_shape: tuple[int, ...] = (6,), eps: float = 3e-5
) -> Tensor:
    return F.layer_norm(x, normalized_shape, None, None, eps) * (1 + scale)[:, None] + shift


def _call(x: Any, normalized_shape: tuple[int, ...] = (1,), **captures: Any) -> Mapping[str, Any] | str:
    if len(normalized_shape) != 1:
        return f"it normalizes over the last {len(normalized_shape)} dimensions"
    for name in ("scale", "shift"):
        if name in captures and (x.shape is None or not modulates(captures[name].shape or (), x.shape)):
            return f"the {name} of shape {captures[name].shape} does not go with x of {x.shape}"
    return {"x": x, **captures}


def _inputs() -> tuple[Tensor, ...]:
    return torch.zeros(4, 6), torch.zeros(6), torch.zeros(6)


def _modulation(affine: bool, axes: bool) -> Callable[[], tuple[Tensor, ...]]:
    scale = (2, 1, 6) if axes else (2, 6)
    shapes = [(2, 4, 6), *([(6,), (6,)] if affine else []), scale, (2, 1, 6)]
    return lambda: tuple(torch.zeros(s) for s in shapes)


SPELLINGS = [
    Spelling("layer_norm", _affine, _inputs, _call),
    Spelling("layer_norm without affine", _plain, lambda: (torch.zeros(4, 6),), _call),
    Spelling("mean and var", _variance, _inputs, _call),
    Spelling("mean and mean square", _mean_square, _inputs, _call),
    Spelling("modulated", _modulated, _modulation(True, True), _call),
    Spelling("modulated without affine", _plain_modulated, _modulation(False, True), _call),
    Spelling("modulated, 1 + scale unsqueezed", _modulated_later, _modulation(True, False), _call),
    Spelling(
        "modulated without affine, 1 + scale unsqueezed", _plain_modulated_later, _modulation(False, False), _call
    ),
]


def eager(x: Tensor, weight: Any, bias: Any, eps: float, scale: Any, shift: Any) -> Tensor:
    return modulated(F.layer_norm(x, x.shape[-1:], weight, bias, eps), scale, shift)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    shape, own = drawn_shape(draw), (dtype, torch.float32)
    x = draw.tensor(shape, dtype, mean=draw.choice((0.0, 8.0)))
    scale, shift = drawn_modulation(draw, shape, draw.choice(own), 2)
    return (x, draw.maybe(shape[-1:], own), draw.maybe(shape[-1:], own), 1e-5, scale, shift)


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
        eager=eager,
        alone=alone,
        draw=_draw,
        formula="((x - mean) / sqrt(variance + eps) * weight + bias) * (1 + scale) + shift over the last dimension",
        source="Ba, Kiros & Hinton 2016, arXiv:1607.06450",
    )
)
