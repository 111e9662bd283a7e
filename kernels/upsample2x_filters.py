"""The four 2x2 filters that a 3x3 convolution after a nearest 2x upsampling comes to, one for each output phase.

An upsampled image repeats every row, so two of the three rows that a filter covers are the same row of the image, and
their weights add up: at even output rows the lower two, at odd ones the upper two; columns likewise.  The phases depend
on the weight alone: a session works them out once, and :mod:`.upsample2x_conv` takes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.op import Case, Cost, Op, Tolerance, register

SCHEMA = "(Tensor weight) -> Tensor"
# [phase][tap][row of the 3x3 filter]; tap t of phase p lies on row t - 1 + p of the image.
FOLD = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


def allocate(weight: Tensor) -> tuple[Tensor, ...]:
    """The uninitialised filters (2, 2, 2, 2, I, O) of weight (O, I, 3, 3), contiguous: phase row, phase column, tap
    row, tap column, input channel, output channel.  Raises ValueError for another shape.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"upsample2x_filters: weight has shape {tuple(weight.shape)}, not (O, I, 3, 3)")
    return (torch.empty((2, 2, 2, 2, weight.shape[1], weight.shape[0]), dtype=weight.dtype, device=weight.device),)


def reference(weight: Tensor) -> Tensor:
    """The sums in float32, or float64 where weight is, rounded once to weight's dtype."""
    (out,) = allocate(weight)
    return out.copy_(folded(weight))


def folded(weight: Tensor) -> Tensor:
    """The filters in float32, or float64 where weight is."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    fold = torch.tensor(FOLD, dtype=wide.dtype, device=wide.device)
    return torch.einsum("ptk,qsl,oikl->pqtsio", fold, fold, wide)


def cost(weight: Tensor) -> Cost:
    """Nine weights a pair of channels read, sixteen written, with eleven additions between."""
    pairs = weight.shape[0] * weight.shape[1]
    return Cost(flops=11 * pairs, bytes=25 * pairs * weight.element_size())


def _case(name: str, outputs: int, inputs: int) -> Case:
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        return (torch.randn(outputs, inputs, 3, 3, generator=g).to(dtype),)

    return Case(name, build)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    return (draw.tensor((*draw.shape(20, 20), 3, 3), dtype),)


OP = register(
    Op(
        name="upsample2x_filters",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={
            torch.float32: Tolerance(rms=1e-6, peak=1e-6),
            torch.bfloat16: Tolerance(rms=4e-3, peak=4.2e-3),
            torch.float16: Tolerance(rms=5e-4, peak=5.2e-4),
        },
        cases=[_case("small", 3, 5), _case("one channel", 1, 1), _case("no outputs", 0, 4), _case("wide", 40, 33)],
        draw=_draw,
        formula="f[p, q, t, s] = sum over k, l of G[p, t, k] G[q, s, l] w[k, l], G[0] = (100, 011), G[1] = (110, 001)",
        source="the polyphase identity for a filter after a zero-order hold",
    )
)
