"""A linear layer and what follows it, y = act(x W^T + bias + residual) * multiplier, in floats.

The kernels are for few rows of x, as a decoding step has them, where the weight's bytes are the time.  They take it as
it lies, and what they add up for a row is the same whatever the other rows are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fusegen.kernels import linear_int8
from fusegen.kernels.draw import Draw
from fusegen.kernels.linear_int8 import ACTIVATIONS, random_tail, random_x
from fusegen.kernels.op import FLOATS, Case, Cost, Op, register

SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, str activation='none', "
    "Tensor? multiplier=None) -> Tensor"
)


def allocate(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none",
    multiplier: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised output (*, N) for x (*, K), weight (N, K) of x's dtype, bias (N,), residual and multiplier
    (*, N): x's dtype, contiguous.  Raises ValueError where arguments do not fit.
    """
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.dtype != x.dtype:
        raise ValueError(
            f"linear: x is {x.dtype} {tuple(x.shape)} and the weight {weight.dtype} {tuple(weight.shape)}, "
            "not (*, K) and (N, K) of one dtype"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: no activation is called {activation!r}; there are {', '.join(ACTIVATIONS)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"linear: bias has shape {tuple(bias.shape)}, the weight has {weight.shape[0]} rows")
    shape = (*x.shape[:-1], weight.shape[0])
    for name, more in (("residual", residual), ("multiplier", multiplier)):
        if more is not None and tuple(more.shape) != shape:
            raise ValueError(f"linear: {name} has shape {tuple(more.shape)}, the output has {shape}")
    return (torch.empty(shape, dtype=x.dtype, device=x.device),)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none",
    multiplier: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """In float32, or float64 as x; rounded once."""
    (out,) = allocate(x, weight, bias, residual, activation, multiplier)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).t()
    for more in (bias, residual):
        y = y if more is None else y + more.to(wide)
    y = ACTIVATIONS[activation](y)
    return out.copy_(y if multiplier is None else y * multiplier.to(wide))


def cost(
    x: Tensor, weight: Tensor, bias: Any = None, residual: Any = None, activation: str = "none", multiplier: Any = None
) -> Cost:
    """The products and sums; every argument read and the output written once."""
    rows = x.numel() // max(1, x.shape[-1])
    tensors = [t for t in (x, weight, bias, residual, multiplier) if t is not None]
    out = rows * weight.shape[0] * x.element_size()
    moved = sum(t.numel() * t.element_size() for t in tensors) + out
    return Cost(flops=2 * rows * weight.numel(), bytes=moved, written=out)


def _eager(x: Tensor, weight: Tensor, bias: Any, residual: Any, activation: str, multiplier: Any) -> Tensor:
    y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    y = ACTIVATIONS[activation](y if residual is None else y + residual)
    return y if multiplier is None else y * multiplier


def _case(
    name: str, lead: tuple[int, ...], n: int, k: int, *, kind: str = "contiguous", bias: str = "no",
    residual: bool = False, activation: str = "none", multiplier: bool = False, bench: bool = False, small: bool = True,
) -> Case:  # fmt: skip
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x = random_x(g, lead, k, dtype, kind)
        weight = (torch.randn(n, k, generator=g) / max(k, 1) ** 0.5).to(dtype)
        tail = random_tail(g, (*lead, n), dtype, bias, residual)
        gate = torch.randn(*lead, n, generator=g).to(dtype) if multiplier else None
        return (x, weight, *tail, activation, gate)

    dtypes = (torch.float32, torch.bfloat16) if bench else FLOATS
    return Case(name, build, dtypes=dtypes, bench=bench, small=small)


CASES = [
    _case("small", (3, 5), 16, 64, bias="same"),
    _case("no rows", (0, 7), 16, 32),
    _case("no columns", (2, 3), 7, 0, bias="same"),
    _case("no outputs", (2, 3), 0, 16),
    _case("one row", (48,), 20, 48, bias="fp32"),
    _case("one element", (1, 1), 1, 1),
    _case("one token", (1, 1), 70, 257, bias="fp32"),
    _case("prime sizes", (3, 7), 37, 131, residual=True),
    _case("few outputs", (1, 5), 3, 40, bias="same", multiplier=True),
    _case("many rows", (2, 67), 83, 201, activation="silu", bias="same", residual=True, small=False),
    _case("gelu", (2, 9), 33, 80, activation="gelu", bias="same"),
    _case("gelu_tanh", (2, 9), 33, 80, activation="gelu_tanh", residual=True),
    _case("quick_gelu", (2, 9), 33, 80, activation="quick_gelu", bias="same"),
    _case("relu", (2, 3), 17, 33, activation="relu", bias="same", residual=True),
    _case("gated", (4, 1), 48, 64, multiplier=True),
    _case("all at once", (2, 3), 24, 65, bias="same", residual=True, activation="silu", multiplier=True),
    _case("padded rows", (2, 5), 24, 64, kind="padded"),
    _case("transposed", (2, 5), 24, 64, kind="transposed"),
    _case("strided", (2, 5), 24, 64, kind="strided"),
    _case("unaligned", (2, 5), 24, 64, kind="unaligned"),
    _case("long rows", (2, 2), 5, 9001, small=False),
    *(
        _case(f"{m}x{n}x{k}", (m, 1), n, k, bench=True, small=False)
        for n, k in ((512, 256), (4096, 256), (4096, 4096))
        for m in (1, 4, 16)
    ),
    _case("1x256x640 residual", (1, 1), 256, 640, residual=True, bench=True, small=False),
    _case("4x640x256 silu", (4, 1), 640, 256, activation="silu", bench=True, small=False),
    _case("1x11008x4096 silu", (1, 1), 11008, 4096, activation="silu", bench=True, small=False),
]


def _alone(args: tuple[Any, ...], b: int) -> tuple[Any, ...]:
    """Sample ``b``: its rows of x, the residual and the multiplier."""
    x, weight, bias, residual, activation, multiplier = args
    residual, multiplier = (t if t is None else t[b : b + 1] for t in (residual, multiplier))
    return (x[b : b + 1], weight, bias, residual, activation, multiplier)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    lead, (n, k) = draw.shape(6, *[20] * draw.integer(0, 1)), draw.shape(50, 150)
    x, weight = draw.tensor((*lead, k), dtype), draw.dense((n, k), dtype, scale=max(k, 1) ** -0.5)
    bias, shape = draw.maybe((n,), (dtype, torch.float32)), (*lead, n)
    return (x, weight, bias, draw.maybe(shape, (dtype,)), draw.choice(tuple(ACTIVATIONS)), draw.maybe(shape, (dtype,)))


OP = register(
    Op(
        name="linear",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance=linear_int8.OP.tolerance,
        cases=CASES,
        eager=_eager,
        alone=_alone,
        draw=_draw,
        formula="act(x W^T + bias + residual) * multiplier",
        source="torch.nn.functional.linear",
    )
)
