"""The first half of a gated feed-forward layer in int8, one pass over x: y = act(x G^T + gate_bias) * (x W^T + bias).

x is quantized to int8 row by row on the way, by the arithmetic of :mod:`.linear_int8`; both products of a tile are in
registers when the activation is taken (as :mod:`.packed_gated_linear` in bfloat16), and the result is rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels import linear_int8, linear_panels, packed_gated_linear
from fusegen.kernels.draw import Draw
from fusegen.kernels.linear_int8 import ACTIVATIONS, random_tail, random_x
from fusegen.kernels.op import FLOATS, Case, Cost, Op, register
from fusegen.kernels.packed_linear import check_bias
from fusegen.kernels.packed_linear_int8 import check, cost_of, eager, plain_weights, random_weights

SCHEMA = (
    "(Tensor x, Tensor panels, Tensor scale, Tensor gate_scale, int outputs, Tensor? bias=None, "
    "Tensor? gate_bias=None, str activation='silu') -> Tensor"
)


def allocate(
    x: Tensor, panels: Tensor, scale: Tensor, gate_scale: Tensor, outputs: int, bias: Tensor | None = None,
    gate_bias: Tensor | None = None, activation: str = "silu",
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised output (*, N), N = ``outputs``, for x (*, K), panels (P, 16 ceil(K / 64), 32, 4) int8 that hold
    two weights, scales and biases (N,): x's dtype, contiguous.  Raises ValueError where arguments do not fit.
    """
    name = "packed_gated_linear_int8"
    check(name, x, panels, outputs, gated=True, scale=scale, gate_scale=gate_scale)
    linear_int8.check(name, x, outputs, None, None, activation)
    check_bias(name, outputs, bias=bias, gate_bias=gate_bias)
    return (torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device),)


def reference(
    x: Tensor, panels: Tensor, scale: Tensor, gate_scale: Tensor, outputs: int, bias: Tensor | None = None,
    gate_bias: Tensor | None = None, activation: str = "silu",
) -> Tensor:  # fmt: skip
    """In float32, or float64 as x; rounded once."""
    (out,) = allocate(x, panels, scale, gate_scale, outputs, bias, gate_bias, activation)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    gate, weight = linear_panels.unpacked(panels, outputs, x.shape[-1], gated=True)
    opened = ACTIVATIONS[activation](linear_int8.reference(wide, gate, gate_scale, gate_bias))
    return out.copy_(opened * linear_int8.reference(wide, weight, scale, bias))


def cost(
    x: Tensor, panels: Tensor, scale: Tensor, gate_scale: Tensor, outputs: int, bias: Any = None,
    gate_bias: Any = None, activation: str = "silu",
) -> Cost:  # fmt: skip
    """The products and sums; every argument read and the output written once."""
    return cost_of(x, outputs, 2, panels, scale, gate_scale, bias, gate_bias)


def _case(
    name: str, lead: tuple[int, ...], n: int, k: int, activation: str = "silu", *, kind: str = "contiguous",
    bias: str = "no", gate_bias: str = "no", bench: bool = False,
) -> Case:  # fmt: skip
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x, weights = random_x(g, lead, k, dtype, kind), random_weights(g, n, k, gated=True)
        biases = (random_tail(g, (*lead, n), dtype, which, False)[0] for which in (bias, gate_bias))
        return (x, *weights, n, *biases, activation)

    return Case(name, build, dtypes=(torch.bfloat16,) if bench else FLOATS, bench=bench)


CASES = [
    *(_case(name, (2, 19), 48, 40, name, bias="same", gate_bias="same") for name in ACTIVATIONS),
    _case("small", (3, 5), 16, 64),
    _case("no rows", (0, 7), 16, 32),
    _case("no columns", (2, 3), 7, 0, bias="same", gate_bias="fp32"),
    _case("no outputs", (2, 3), 0, 16),
    _case("one row", (48,), 20, 48, bias="fp32"),
    _case("one element", (1, 1), 1, 1),
    _case("prime sizes", (3, 47), 37, 131, "gelu", gate_bias="fp32"),
    _case("several blocks", (2, 601), 97, 70, "gelu", bias="same", gate_bias="same"),
    _case("many blocks", (3, 1000), 33, 64, "gelu", bias="same"),
    _case("padded rows", (2, 25), 24, 64, kind="padded"),
    _case("transposed", (7, 5), 24, 64, "gelu_tanh", kind="transposed"),
    _case("unaligned", (2, 25), 24, 63, kind="unaligned"),
    _case("geglu 8192x1280x320", (2, 4096), 1280, 320, "gelu", bias="same", gate_bias="same", bench=True),
    _case("geglu 2048x2560x640", (2, 1024), 2560, 640, "gelu", bias="same", gate_bias="same", bench=True),
    _case("geglu 512x5120x1280", (2, 256), 5120, 1280, "gelu", bias="same", gate_bias="same", bench=True),
]


def _eager(
    x: Tensor, panels: Tensor, scale: Tensor, gate_scale: Tensor, outputs: int, bias: Any, gate_bias: Any,
    activation: str,
) -> Tensor:  # fmt: skip
    """Two products, and one of their results."""
    gate, weight = plain_weights(x, panels, outputs, gated=True)
    opened = eager(x, gate, gate_scale, gate_bias, None, activation)
    return opened * eager(x, weight, scale, bias, None, "none")


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    lead, (n, k) = draw.shape(6, *[20] * draw.integer(0, 1)), draw.shape(40, 150)
    x, weights = draw.tensor((*lead, k), dtype), random_weights(draw.generator(), n, k, gated=True)
    biases = (draw.maybe((n,), (dtype, torch.float32)) for _ in range(2))
    return (x, *weights, n, *biases, draw.choice(tuple(ACTIVATIONS)))


OP = register(
    Op(
        name="packed_gated_linear_int8",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance=packed_gated_linear.OP.tolerance,
        cases=CASES,
        eager=_eager,
        draw=_draw,
        formula="act(x G^T + gate_bias) * (x W^T + bias), x in codes of its rows, both weights in int8 panels",
        source="Shazeer 2020, arXiv:2002.05202; Yao et al. 2022 (ZeroQuant), arXiv:2206.01861",
    )
)
