"""A residual addition and the norm of its sum, in one pass: both are needed, the sum by the next residual addition.

sum = x + gate * branch, rounded to x's dtype; y = norm(sum), the layer norm or RMS norm of the sum as it was stored,
with the parameters and the modulation of :mod:`.layer_norm` and :mod:`.rms_norm`.  The gate, where there is one, is
that of adaptive layer norm (Peebles & Xie 2023) and has the shapes of a scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels import layer_norm, rms_norm
from fusegen.kernels.draw import Draw
from fusegen.kernels.norm_cases import Inputs, bench, cases, drawn_modulation, drawn_shape
from fusegen.kernels.op import Cost, Op, Tolerance, register
from fusegen.kernels.rows import alone, check_modulation, check_parameters, size_of, spread

KINDS = ("layer", "rms")
SCHEMA = (
    "(Tensor x, Tensor branch, Tensor? gate=None, Tensor? weight=None, Tensor? bias=None, Tensor? scale=None,"
    ' Tensor? shift=None, float eps=1e-5, str kind="layer", float offset=0.0) -> (Tensor, Tensor)'
)


def allocate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    kind: str = "layer",
    offset: float = 0.0,
) -> tuple[Tensor, ...]:
    """The uninitialised norm and sum: of x's shape and dtype, contiguous.

    Raises ValueError where shapes or dtypes do not fit, for an unknown kind, and for an RMS norm with a bias or a layer
    norm with an offset.
    """
    if kind not in KINDS:
        raise ValueError(f"add_norm: no kind is called {kind!r}; there are {', '.join(KINDS)}")
    if (kind == "rms" and bias is not None) or (kind == "layer" and offset):
        raise ValueError(f"add_norm: the kind {kind!r} takes no {'bias' if kind == 'rms' else 'offset'}")
    if branch.shape != x.shape or branch.dtype != x.dtype:
        raise ValueError(
            f"add_norm: branch is {branch.dtype} {tuple(branch.shape)}, x {x.dtype} {tuple(x.shape)}; make them alike"
        )
    check_parameters("add_norm", x, weight=weight, bias=bias)
    check_modulation("add_norm", x, gate=gate, scale=scale, shift=shift)
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))


def reference(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    kind: str = "layer",
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The norm of x + gate * branch (*, C), and that sum; in float32, or float64 where x is."""
    _, total = allocate(x, branch, gate, weight, bias, scale, shift, eps, kind, offset)
    wide = torch.promote_types(x.dtype, torch.float32)
    added = branch.to(wide) if gate is None else branch.to(wide) * spread(gate, x).to(wide)
    total.copy_(x.to(wide) + added)
    if kind == "layer":
        return layer_norm.reference(total, weight, bias, eps, scale, shift), total
    return rms_norm.reference(total, weight, eps, scale, shift, offset), total


def cost(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    kind: str = "layer",
    offset: float = 0.0,
) -> Cost:
    """The norm's operations and one or two for the addition; x and branch read, norm and sum written once."""
    norm = 5 if kind == "layer" else 4
    each = norm + 1 + (gate is not None) + (scale is not None) + (shift is not None)
    return Cost(flops=each * x.numel(), bytes=size_of(x, x, branch, branch, gate, weight, bias, scale, shift))


def _build(inputs: Inputs, g: Generator, dtype: torch.dtype, kind: str = "layer", offset: float = 0.0) -> Any:
    x, branch = inputs.tensor(g, dtype), inputs.tensor(g, dtype)
    weight, bias = inputs.affine(g, dtype)
    gate, scale, shift = inputs.modulations(g, dtype, 3)
    return (x, branch, gate, weight, bias if kind == "layer" else None, scale, shift, 1e-5, kind, offset)


def _rms(inputs: Inputs, g: Generator, dtype: torch.dtype) -> Any:
    return _build(inputs, g, dtype, "rms")


def _offset(inputs: Inputs, g: Generator, dtype: torch.dtype) -> Any:
    return _build(inputs, g, dtype, "rms", 1.0)


CASES = [
    *cases(_build, [bench(2, 256, 1152, parameters="no", modulation="chunk"), bench(2, 1024, 640)]),
    *cases(
        _rms,
        [
            Inputs("rms", (3, 5, 16)),
            Inputs("rms, prime width", (5, 3, 509)),
            Inputs("rms modulated", (2, 7, 33), modulation="axes"),
            bench(1, 512, 4096),
            bench(1, 4608, 3072, modulation="chunk"),
        ],
        shared=False,
    ),
    *cases(_offset, [Inputs("rms, weight from 1", (3, 7, 40))], shared=False),
]


def _eager(
    x: Tensor, branch: Tensor, gate: Any, weight: Any, bias: Any, scale: Any, shift: Any, eps: float, kind: str,
    offset: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    total = x + branch if gate is None else x + spread(gate, x) * branch
    if kind == "layer":
        return layer_norm.eager(total, weight, bias, eps, scale, shift), total
    return rms_norm.eager(total, weight, eps, scale, shift, offset), total


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    shape, own, rms = drawn_shape(draw), (dtype, torch.float32), draw.flag()
    x, branch = draw.tensor(shape, dtype), draw.tensor(shape, dtype)
    weight, bias = draw.maybe(shape[-1:], own), None if rms else draw.maybe(shape[-1:], own)
    gate, scale, shift = drawn_modulation(draw, shape, draw.choice(own), 3)
    kind, offset = ("rms", draw.choice((0.0, 1.0))) if rms else ("layer", 0.0)
    return (x, branch, gate, weight, bias, scale, shift, 1e-5, kind, offset)


OP = register(
    Op(
        name="add_norm",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        # Half precision rounds twice: the sum, then its norm.
        tolerance={
            torch.float32: Tolerance(rms=5e-6, peak=1e-5),
            torch.bfloat16: Tolerance(rms=4e-3, peak=6e-3),
            torch.float16: Tolerance(rms=5e-4, peak=7.5e-4),
        },
        cases=CASES,
        eager=_eager,
        alone=alone,
        draw=_draw,
        formula="norm(sum), sum where sum = x + gate * branch and norm is layer_norm or rms_norm",
        source="Peebles & Xie 2023, arXiv:2212.09748 (the gate); Ba et al. 2016; Zhang & Sennrich 2019",
    )
)
