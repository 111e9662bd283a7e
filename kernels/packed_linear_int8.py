"""A linear layer of many rows by an int8 weight in panels: :mod:`.linear_int8`, to the bit, on what a session packs.

y = act(x W^T + bias) + residual, x quantized to int8 row by row on the way.  Few rows have :mod:`.linear_int8`, which
takes the weight as it lies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fusegen.kernels import linear_int8, linear_panels
from fusegen.kernels.draw import Draw
from fusegen.kernels.linear_int8 import random_tail, random_x
from fusegen.kernels.op import FLOATS, Case, Cost, Op, register

SCHEMA = (
    "(Tensor x, Tensor panels, Tensor scale, int outputs, Tensor? bias=None, Tensor? residual=None, "
    "str activation='none') -> Tensor"
)


def check(name: str, x: Tensor, panels: Tensor, outputs: int, gated: bool, **scales: Tensor) -> None:
    """Raises ValueError where panels or scales do not fit x (*, K) and so many outputs of the op called ``name``."""
    if x.dim() < 1 or outputs < 0 or panels.dtype != torch.int8:
        raise ValueError(f"{name}: x is {tuple(x.shape)}, panels are {panels.dtype}, for {outputs} outputs")
    want = linear_panels.shape_of(outputs, x.shape[-1], gated, torch.int8)
    if tuple(panels.shape) != want:
        raise ValueError(f"{name}: panels have shape {tuple(panels.shape)}, for these x and outputs it is {want}")
    for what, scale in scales.items():
        if tuple(scale.shape) != (outputs,):
            raise ValueError(f"{name}: {what} has shape {tuple(scale.shape)}, not ({outputs},)")


def allocate(
    x: Tensor, panels: Tensor, scale: Tensor, outputs: int, bias: Tensor | None = None,
    residual: Tensor | None = None, activation: str = "none",
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised output (*, N), N = ``outputs``, for x (*, K), panels (P, 16 ceil(K / 64), 32, 4) int8, scale
    and bias (N,) and residual (*, N): x's dtype, contiguous.  Raises ValueError where arguments do not fit.
    """
    check("packed_linear_int8", x, panels, outputs, gated=False, scale=scale)
    linear_int8.check("packed_linear_int8", x, outputs, bias, residual, activation)
    return (torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device),)


def reference(
    x: Tensor, panels: Tensor, scale: Tensor, outputs: int, bias: Tensor | None = None,
    residual: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """:mod:`.linear_int8` of the weight that the panels hold."""
    allocate(x, panels, scale, outputs, bias, residual, activation)
    (weight,) = linear_panels.unpacked(panels, outputs, x.shape[-1])
    return linear_int8.reference(x, weight, scale, bias, residual, activation)


def cost(
    x: Tensor, panels: Tensor, scale: Tensor, outputs: int, bias: Any = None, residual: Any = None,
    activation: str = "none",
) -> Cost:  # fmt: skip
    """The products and sums; every argument read and the output written once."""
    return cost_of(x, outputs, 1, panels, scale, bias, residual)


def cost_of(x: Tensor, outputs: int, products: int, *more: Tensor | None) -> Cost:
    """The cost of so many ``products`` of x (*, K) with outputs (*, N), and of reading ``more``."""
    out = x.numel() // max(1, x.shape[-1]) * outputs * x.element_size()
    moved = sum(t.numel() * t.element_size() for t in (x, *more) if t is not None) + out
    return Cost(flops=2 * products * x.numel() * outputs, bytes=moved, written=out, products="int8")


def random_weights(g: Generator, n: int, k: int, gated: bool) -> tuple[Tensor, ...]:
    """Panels of int8 weights (N, K), one or two, and a scale (N,) for each, for outputs of about one."""
    parts = range(2 if gated else 1)
    codes = [torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8) for _ in parts]
    scales = ((0.5 + torch.rand(n, generator=g)) / (74 * max(k, 1) ** 0.5) for _ in parts)
    return (linear_panels.reference(codes[0], codes[1] if gated else None), *scales)


def _case(
    name: str, lead: tuple[int, ...], n: int, k: int, *, kind: str = "contiguous", bias: str = "no",
    residual: bool = False, activation: str = "none", bench: bool = False,
) -> Case:  # fmt: skip
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x, weights = random_x(g, lead, k, dtype, kind), random_weights(g, n, k, gated=False)
        return (x, *weights, n, *random_tail(g, (*lead, n), dtype, bias, residual), activation)

    return Case(name, build, dtypes=(torch.bfloat16,) if bench else FLOATS, bench=bench)


CASES = [
    _case("small", (3, 5), 16, 64, bias="same"),
    _case("no rows", (0, 7), 16, 32),
    _case("no columns", (2, 3), 7, 0, bias="same"),
    _case("no outputs", (2, 3), 0, 16),
    _case("one row", (48,), 20, 48, bias="fp32"),
    _case("one element", (1, 1), 1, 1),
    _case("prime sizes", (3, 47), 37, 131, residual=True, bias="fp32"),
    _case("whole panels", (2, 64), 64, 128, residual=True, bias="same"),
    _case("one more than whole", (5, 13), 65, 65, bias="same"),
    _case("several blocks", (2, 601), 97, 70, activation="silu", bias="same", residual=True),
    _case("many blocks", (3, 1000), 33, 64, bias="same"),
    _case("gelu", (2, 9), 33, 80, activation="gelu", bias="same"),
    _case("relu", (2, 3), 17, 33, activation="relu", bias="same", residual=True),
    _case("extremes", (2, 23), 24, 64, kind="extremes"),
    _case("padded rows", (2, 25), 24, 64, kind="padded"),
    _case("transposed", (7, 5), 24, 64, kind="transposed"),
    _case("unaligned", (2, 25), 24, 63, kind="unaligned"),
    _case("long rows", (2, 9), 5, 9001),
    _case("8192x320x320 residual", (2, 4096), 320, 320, bias="same", residual=True, bench=True),
    _case("8192x960x320", (2, 4096), 960, 320, bench=True),
    _case("8192x320x1280 residual", (2, 4096), 320, 1280, bias="same", residual=True, bench=True),
    _case("2048x640x640 residual", (2, 1024), 640, 640, bias="same", residual=True, bench=True),
    _case("512x1280x5120 residual", (2, 256), 1280, 5120, bias="same", residual=True, bench=True),
    _case("512x4608x1152 gelu_tanh", (2, 256), 4608, 1152, bias="same", activation="gelu_tanh", bench=True),
]


_plain: Any = WeakTensorKeyDictionary()  # panels -> the weights they hold


def plain_weights(x: Tensor, panels: Tensor, outputs: int, gated: bool) -> tuple[Tensor, ...]:
    """The weights of the panels as a user of PyTorch has them, made once."""
    if panels not in _plain:
        _plain[panels] = tuple(w.contiguous() for w in linear_panels.unpacked(panels, outputs, x.shape[-1], gated))
    found: tuple[Tensor, ...] = _plain[panels]
    return found


def eager(x: Tensor, weight: Tensor, scale: Tensor, *tail: Any) -> Tensor:
    """:mod:`.linear_int8`'s."""
    assert linear_int8.OP.eager is not None
    return linear_int8.OP.eager(x, weight, scale, *tail)


def _eager(x: Tensor, panels: Tensor, scale: Tensor, outputs: int, *tail: Any) -> Tensor:
    return eager(x, *plain_weights(x, panels, outputs, gated=False), scale, *tail)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    lead, (n, k) = draw.shape(6, *[20] * draw.integer(0, 1)), draw.shape(70, 150)
    x, weights = draw.tensor((*lead, k), dtype), random_weights(draw.generator(), n, k, gated=False)
    return (x, *weights, n, *linear_int8.draw_tail(draw, (*lead, n), dtype))


OP = register(
    Op(
        name="packed_linear_int8",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance=linear_int8.OP.tolerance,
        cases=CASES,
        eager=_eager,
        alone=lambda args, b: linear_int8.alone(args, b, residual=5),
        draw=_draw,
        formula="act(absmax/127 * scale * (round(127 x / absmax) W^T) + bias) + residual, W in panels",
        source="Yao et al. 2022 (ZeroQuant), arXiv:2206.01861",
    )
)
