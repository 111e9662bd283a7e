"""Root mean square normalization over the last dimension (Zhang & Sennrich 2019), modulated where a scale is given.

y = x / sqrt(mean(x^2) + eps) * (offset + weight) * (1 + scale) + shift.  ``offset`` is 0, or 1 in models that train the
weight's distance from 1 (Gemma); without a weight it does not count.  Scale and shift are those of :mod:`.layer_norm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.norm_cases import Inputs, bench, cases, drawn_modulation, drawn_shape
from fusegen.kernels.op import Case, Cost, Op, Spelling, Tolerance, register
from fusegen.kernels.rows import alone, check_modulation, check_parameters, finish, modulated, modulates, size_of

SCHEMA = (
    "(Tensor x, Tensor? weight=None, float eps=1e-6, Tensor? scale=None, Tensor? shift=None, float offset=0.0)"
    " -> Tensor"
)
EPSILON = torch.finfo(torch.float32).eps  # what PyTorch's operator takes where it is given None


def allocate(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    offset: float = 0.0,
) -> tuple[Tensor, ...]:
    """The uninitialised output: of x's shape and dtype, contiguous.  Raises ValueError where parameters do not fit."""
    check_parameters("rms_norm", x, weight=weight)
    check_modulation("rms_norm", x, scale=scale, shift=shift)
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),)


def reference(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    offset: float = 0.0,
) -> Tensor:
    """RMS normalization of x (*, C) in float32, or float64 where x is."""
    (out,) = allocate(x, weight, eps, scale, shift, offset)
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return out.copy_(finish(y, None if weight is None else offset + weight.to(y.dtype), None, scale, shift))


def cost(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    offset: float = 0.0,
) -> Cost:
    """Four operations an element (square, sum, two products), two more where modulated; all moved once."""
    each = 4 + (scale is not None) + (shift is not None)
    return Cost(flops=each * x.numel(), bytes=size_of(x, x, weight, scale, shift))


def _build(inputs: Inputs, g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
    x, (weight, _) = inputs.tensor(g, dtype), inputs.affine(g, dtype)
    return (x, weight, 1e-6, *inputs.modulations(g, dtype, 2), 0.0)


def _offset(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
    return (torch.randn(3, 7, 33, generator=g).to(dtype), torch.randn(33, generator=g).to(dtype), 1e-6, None, None, 1.0)


CASES = [
    *cases(
        _build,
        [
            Inputs("mean far above deviation", (6, 257), mean=64.0),
            bench(1, 512, 4096),
            bench(2, 2048, 4096),
            bench(8, 128, 896),
            bench(1, 4608, 24, 128),
            bench(2, 4096, 2304, modulation="chunk"),
        ],
    ),
    Case("weight from 1", _offset, small=True),
]


def _operator(
    x: Tensor, weight: Tensor, *, normalized_shape: tuple[int, ...] = (6,), eps: float | None = 3e-5
) -> Tensor:
    return F.rms_norm(x, normalized_shape, weight, eps)


def _operator_plain(x: Tensor, *, normalized_shape: tuple[int, ...] = (6,), eps: float | None = 3e-5) -> Tensor:
    return F.rms_norm(x, normalized_shape, None, eps)


def _operator_modulated(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    normalized_shape: tuple[int, ...] = (6,),
    eps: float | None = 3e-5,
) -> Tensor:
    return F.rms_norm(x, normalized_shape, weight, eps) * (1 + scale) + shift


def _operator_plain_modulated(
    x: Tensor, scale: Tensor, shift: Tensor, *, normalized_shape: tuple[int, ...] = (6,), eps: float | None = 3e-5
) -> Tensor:
    return F.rms_norm(x, normalized_shape, None, eps) * (1 + scale) + shift


def _llama(x: Tensor, weight: Tensor, *, eps: float = 3e-5) -> Tensor:
    wide = x.to(torch.float32)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _t5(x: Tensor, weight: Tensor, *, eps: float = 3e-5) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return weight * (x * torch.rsqrt(variance + eps)).to(weight.dtype)


def _olmo(x: Tensor, weight: Tensor, *, eps: float = 3e-5) -> Tensor:
    wide = x.to(torch.float32)
    return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def _gemma(x: Tensor, weight: Tensor, *, eps: float = 3e-5) -> Tensor:
    wide = x.to(torch.float32)
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (y * (1.0 + weight.to(torch.float32))).to(x.dtype)


def _square_root(x: Tensor, weight: Tensor, *, eps: float = 3e-5) -> Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _product(x: Tensor, weight: Tensor, *, eps: float = 3e-5) -> Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def _modulated(x: Tensor, weight: Tensor, scale: Tensor, *, eps: float = 3e-5) -> Tensor:
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + eps)).to(weight.dtype) * weight * (1 + scale)


def _plain(x: Tensor, *, eps: float = 3e-5) -> Tensor:
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _call(
    x: Any, normalized_shape: tuple[int, ...] = (1,), eps: float | None = None, **captures: Any
) -> Mapping[str, Any] | str:
    if len(normalized_shape) != 1:
        return f"it normalizes over the last {len(normalized_shape)} dimensions"
    if eps is None and x.dtype == torch.float64:
        return "PyTorch's epsilon for float64 is another"
    weight = captures.get("weight")
    if weight is not None and len(weight.shape or ()) != 1:
        return f"the weight of shape {weight.shape} is not one a channel"
    for name in ("scale", "shift"):
        if name in captures and (x.shape is None or not modulates(captures[name].shape or (), x.shape)):
            return f"the {name} of shape {captures[name].shape} does not go with x of {x.shape}"
    return {"x": x, "eps": EPSILON if eps is None else eps, **captures}


def _call_from_1(weight: Any, **captures: Any) -> Mapping[str, Any] | str:
    """1 + a parameter is Gemma's weight; 1 + something of more dimensions is a modulation."""
    if len(weight.shape or ()) == 1:
        return _call(weight=weight, offset=1.0, **captures)
    return _call(scale=weight, **captures)


def _inputs(*widths: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.zeros(s) for s in ((2, 4, 6), *widths))


_AXES = (2, 1, 6)
SPELLINGS = [
    Spelling("rms_norm", _operator, _inputs((6,)), _call),
    Spelling("rms_norm without weight", _operator_plain, _inputs(), _call),
    Spelling("rms_norm modulated", _operator_modulated, _inputs((6,), _AXES, _AXES), _call),
    Spelling("rms_norm without weight modulated", _operator_plain_modulated, _inputs(_AXES, _AXES), _call),
    Spelling("cast, weight last", _llama, _inputs((6,)), _call),
    Spelling("root in float32", _t5, _inputs((6,)), _call),
    Spelling("weight in float32", _olmo, _inputs((6,)), _call),
    Spelling("1 + weight", _gemma, _inputs((6,)), _call_from_1),
    Spelling("divided by the root", _square_root, _inputs((6,)), _call),
    Spelling("x*x", _product, _inputs((6,)), _call),
    Spelling("scaled", _modulated, _inputs((6,), _AXES), _call),
    Spelling("without weight", _plain, _inputs(), _call),
]


def eager(x: Tensor, weight: Any, eps: float, scale: Any, shift: Any, offset: float) -> Tensor:
    own = weight + offset if weight is not None and offset else weight
    return modulated(F.rms_norm(x, x.shape[-1:], own, eps), scale, shift)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    shape, own = drawn_shape(draw), (dtype, torch.float32)
    x = draw.tensor(shape, dtype, mean=draw.choice((0.0, 8.0)))
    scale, shift = drawn_modulation(draw, shape, draw.choice(own), 2)
    return (x, draw.maybe(shape[-1:], own), 1e-6, scale, shift, draw.choice((0.0, 1.0)))


OP = register(
    Op(
        name="rms_norm",
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
        formula="x / sqrt(mean(x^2) + eps) * (offset + weight) * (1 + scale) + shift over the last dimension",
        source="Zhang & Sennrich 2019, arXiv:1910.07467",
    )
)
