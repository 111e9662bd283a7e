"""A 3x3 weight as products of pairs of channels read it, in bfloat16.

:mod:`.packed_conv2d` multiplies by the taps as they are, Winograd's algorithm (:mod:`.winograd_conv2d`,
:mod:`.winograd_modulated_conv2d`) by what it makes of them.

A session lays it so once.  The filters of Winograd's F(2 x 2, 3 x 3) are 16 for these nine taps: a convolution makes
them as it goes, which is as fast as to read them.  16 products of channels for the 36 of 2 x 2 pixels; the larger tiles
of :mod:`.winograd_filters` amplify what bfloat16 rounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels.draw import Draw
from fusegen.kernels.op import FLOATS, Case, Cost, Op, Tolerance, register

SCHEMA = "(Tensor weight) -> Tensor"
GROUP = 32  # output channels that lie together
# Interpolation at 0, 1, -1 and infinity.
FILTER = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def allocate(weight: Tensor) -> tuple[Tensor, ...]:
    """The uninitialised taps (P, ceil(I / 2), 3, 3, 32, 2) of weight (O, I, 3, 3), contiguous, in bfloat16 (float64
    where weight is): P groups of 32 output channels, input channels in pairs, zeros after the last of either.

    Raises ValueError for another shape.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"conv_taps: weight has shape {tuple(weight.shape)}, not (O, I, 3, 3)")
    groups, pairs = -(-weight.shape[0] // GROUP), -(-weight.shape[1] // 2)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.bfloat16
    return (torch.empty((groups, pairs, 3, 3, GROUP, 2), dtype=dtype, device=weight.device),)


def reference(weight: Tensor) -> Tensor:
    """The weight with its axes in another order, rounded."""
    (out,) = allocate(weight)
    filled = weight.new_zeros((out.shape[0] * GROUP, 2 * out.shape[1], 3, 3))
    filled[: weight.shape[0], : weight.shape[1]] = weight
    return out.copy_(filled.unflatten(1, (-1, 2)).unflatten(0, (-1, GROUP)).permute(0, 2, 4, 5, 1, 3))


def weight_of(taps: Tensor, inputs: int) -> Tensor:
    """The weight (32 P, I, 3, 3) whose taps these are, with what pads the outputs."""
    return taps.permute(0, 4, 1, 5, 2, 3).flatten(0, 1).flatten(1, 2)[:, :inputs]


def filters_of(taps: Tensor, inputs: int) -> Tensor:
    """G w G^T rounded to bfloat16, (4, 4, I, 32 P), in float32, or float64 where the taps are."""
    wide = weight_of(taps, inputs).to(torch.promote_types(taps.dtype, torch.float32))
    g = torch.tensor(FILTER, dtype=wide.dtype, device=wide.device)
    return torch.einsum("ak,oikl,bl->abio", g, wide, g).bfloat16().to(wide.dtype)


def cost(weight: Tensor) -> Cost:
    """Each weight read and written once."""
    return Cost(flops=0, bytes=weight.numel() * (weight.element_size() + 2))


# Cases of filters that lie in groups of GROUP outputs: name, outputs and inputs of the weight, for benchmarks or not.
SIZES = (
    ("small", 3, 5, False),
    ("one channel", 1, 1, False),
    ("no outputs", 0, 4, False),
    ("no inputs", 4, 0, False),
    ("wide", 70, 33, False),
    ("whole groups", 64, 48, False),
    ("640x640", 640, 640, True),
)


def _case(name: str, outputs: int, inputs: int, bench: bool = False) -> Case:
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        return (torch.randn(outputs, inputs, 3, 3, generator=g).to(dtype),)

    return Case(name, build, dtypes=(torch.float32,) if bench else FLOATS, bench=bench)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    return (draw.tensor((*draw.shape(40, 20), 3, 3), dtype),)


OP = register(
    Op(
        name="conv_taps",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance=dict.fromkeys(FLOATS, Tolerance(rms=4e-3, peak=4.2e-3)),
        cases=[_case(*size) for size in SIZES],
        alone=None,
        draw=_draw,
        formula="w, in pairs of inputs and groups of 32 outputs",
        source="Lavin & Gray 2015, arXiv:1509.09308",
    )
)
