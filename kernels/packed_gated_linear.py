"""The first half of a gated feed-forward layer in one pass over x: y = act(x G^T + gate_bias) * (x W^T + bias).

GEGLU, SwiGLU and their kin (Shazeer 2020, "GLU variants improve transformer").  Both products of a tile are in
registers when the activation is taken, so that neither is ever written.  The weights are in the panels of
:mod:`.linear_panels`; what the kernels add up for a row is the same whatever the other rows are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels import linear, linear_panels
from fusegen.kernels.draw import Draw
from fusegen.kernels.linear_int8 import ACTIVATIONS, random_tail, random_x
from fusegen.kernels.op import FLOATS, Case, Cost, Op, Tolerance, register
from fusegen.kernels.packed_linear import check, check_bias, cost_of, plain, plain_weights, random_weights

SCHEMA = (
    "(Tensor x, Tensor panels, int outputs, Tensor? bias=None, Tensor? gate_bias=None, str activation='silu') -> Tensor"
)


def allocate(
    x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None = None, gate_bias: Tensor | None = None,
    activation: str = "silu",
) -> tuple[Tensor, ...]:  # fmt: skip
    """The uninitialised output (*, N), N = ``outputs``, for x (*, K), panels (:mod:`.linear_panels`) of x's dtype that
    hold two weights, and biases (N,): x's dtype, contiguous.  Raises ValueError where arguments do not fit.
    """
    check("packed_gated_linear", x, panels, outputs, activation, gated=True)
    check_bias("packed_gated_linear", outputs, bias=bias, gate_bias=gate_bias)
    return (torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device),)


def reference(
    x: Tensor, panels: Tensor, outputs: int, bias: Tensor | None = None, gate_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:  # fmt: skip
    """In float32, or float64 as x; rounded once."""
    (out,) = allocate(x, panels, outputs, bias, gate_bias, activation)
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, value = (
        linear.reference(x.to(wide), w.to(wide), b)
        for w, b in zip(linear_panels.unpacked(panels, outputs, x.shape[-1], True), (gate_bias, bias), strict=True)
    )
    return out.copy_(ACTIVATIONS[activation](gate) * value)


def cost(
    x: Tensor, panels: Tensor, outputs: int, bias: Any = None, gate_bias: Any = None, activation: str = "silu"
) -> Cost:
    """The products and sums; every argument read and the output written once."""
    return cost_of(x, outputs, 2, panels, bias, gate_bias)


def _case(
    name: str, lead: tuple[int, ...], n: int, k: int, activation: str = "silu", *, kind: str = "contiguous",
    bias: str = "no", gate_bias: str = "no", bench: bool = False,
) -> Case:  # fmt: skip
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        x, panels = random_x(g, lead, k, dtype, kind), random_weights(g, n, k, dtype, gated=True)
        biases = (random_tail(g, (*lead, n), dtype, which, False)[0] for which in (bias, gate_bias))
        return (x, panels, n, *biases, activation)

    return Case(name, build, dtypes=(torch.float32, torch.bfloat16) if bench else FLOATS, bench=bench)


CASES = [
    *(_case(name, (2, 19), 48, 40, name, bias="same", gate_bias="same") for name in ACTIVATIONS),
    _case("small", (3, 5), 16, 64),
    _case("no rows", (0, 7), 16, 32),
    _case("no columns", (2, 3), 7, 0, bias="same", gate_bias="fp32"),
    _case("no outputs", (2, 3), 0, 16),
    _case("one row", (48,), 20, 48, bias="fp32"),
    _case("one element", (1, 1), 1, 1),
    _case("prime sizes", (3, 47), 37, 131, "gelu", gate_bias="fp32"),
    _case("several blocks", (2, 201), 97, 70, "gelu", bias="same", gate_bias="same"),
    _case("padded rows", (2, 25), 24, 64, kind="padded"),
    _case("transposed", (7, 5), 24, 64, "gelu_tanh", kind="transposed"),
    _case("strided", (2, 5), 24, 64, kind="strided"),
    _case("unaligned", (2, 25), 24, 63, kind="unaligned"),
    _case("geglu 8192x1280x320", (2, 4096), 1280, 320, "gelu", bias="same", gate_bias="same", bench=True),
    _case("geglu 2048x2560x640", (2, 1024), 2560, 640, "gelu", bias="same", gate_bias="same", bench=True),
    _case("geglu 512x5120x1280", (2, 256), 5120, 1280, "gelu", bias="same", gate_bias="same", bench=True),
    _case("swiglu 512x5632x2048", (1, 512), 5632, 2048, bench=True),
]


def _eager(x: Tensor, panels: Tensor, outputs: int, bias: Any, gate_bias: Any, activation: str) -> Tensor:
    """Two products, the second one's epilogue the multiplication."""
    gate, weight = plain_weights(x, panels, outputs, gated=True)
    return plain(x, weight, bias, "none", plain(x, gate, gate_bias, activation), "mul")


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    lead, (n, k) = draw.shape(6, *[20] * draw.integer(0, 1)), draw.shape(40, 90)
    x, panels = draw.tensor((*lead, k), dtype), random_weights(draw.generator(), n, k, dtype, gated=True)
    biases = (draw.maybe((n,), (dtype, torch.float32)) for _ in range(2))
    return (x, panels, n, *biases, draw.choice(tuple(ACTIVATIONS)))


OP = register(
    Op(
        name="packed_gated_linear",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={  # as gated_mlp_act: an activation as exact as the dtype it is rounded to, then a product
            torch.float32: Tolerance(rms=1e-6, peak=2e-6),
            torch.bfloat16: Tolerance(rms=4e-3, peak=4.2e-3),
            torch.float16: Tolerance(rms=5e-4, peak=5.2e-4),
        },
        cases=CASES,
        eager=_eager,
        draw=_draw,
        formula="act(x G^T + gate_bias) * (x W^T + bias), both weights in panels",
        source="Shazeer 2020, arXiv:2002.05202",
    )
)
