"""A 3x3 weight as products of pairs of channels read it, in bfloat16.

:mod:`.packed_conv2d` multiplies by the taps as they are, Winograd's algorithm (:mod:`.winograd_conv2d`,
:mod:`.winograd_modulated_conv2d`) by what it makes of them.

A convolution of a nearest 2x upsampling is four of 2x2 taps, one for each place in a pixel's 2 x 2
(:mod:`.upsample2x_filters`): ``doubled`` lays those.

A session lays it so once.  The filters of Winograd's F(2 x 2, 3 x 3) are 16 for these nine taps: a convolution makes
them as it goes, which is as fast as to read them.  16 products of channels for the 36 of 2 x 2 pixels; the larger tiles
of :mod:`.winograd_filters` amplify what bfloat16 rounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels import upsample2x_filters
from fusegen.kernels.draw import Draw
from fusegen.kernels.op import FLOATS, Case, Cost, Op, Tolerance, register

SCHEMA = "(Tensor weight, bool doubled=False) -> Tensor"
GROUP = 32  # output channels that lie together
# Interpolation at 0, 1, -1 and infinity.
FILTER = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


def allocate(weight: Tensor, doubled: bool = False) -> tuple[Tensor, ...]:
    """The uninitialised taps (P, ceil(I / 2), 3, 3, 32, 2) of weight (O, I, 3, 3), or where ``doubled`` (P, 2, 2,
    ceil(I / 2), 2, 2, 32, 2), contiguous, in bfloat16 (float64 where weight is): P groups of 32 output channels, rows
    and columns of the phases, input channels in pairs, rows and columns of the taps; zeros after the last channels.

    Raises ValueError for another shape.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"conv_taps: weight has shape {tuple(weight.shape)}, not (O, I, 3, 3)")
    shape = taps_shape(weight.shape[0], weight.shape[1], doubled)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.bfloat16
    return (torch.empty(shape, dtype=dtype, device=weight.device),)


def taps_shape(outputs: int, inputs: int, doubled: bool) -> tuple[int, ...]:
    """The shape of such a weight's taps."""
    groups, pairs = -(-outputs // GROUP), -(-inputs // 2)
    return (groups, 2, 2, pairs, 2, 2, GROUP, 2) if doubled else (groups, pairs, 3, 3, GROUP, 2)


def reference(weight: Tensor, doubled: bool = False) -> Tensor:
    """The weight, or the phases added up in float32 (float64 where weight is), its axes in another order, rounded."""
    (out,) = allocate(weight, doubled)
    parts = upsample2x_filters.folded(weight) if doubled else weight.permute(2, 3, 1, 0)  # (..., I, O)
    filled = parts.new_zeros((*parts.shape[:-2], 2 * -(-weight.shape[1] // 2), out.shape[0] * GROUP))
    filled[..., : weight.shape[1], : weight.shape[0]] = parts
    lanes = filled.unflatten(-1, (-1, GROUP)).unflatten(-3, (-1, 2))  # (..., pairs, 2, groups, 32)
    order = (6, 0, 1, 4, 2, 3, 7, 5) if doubled else (4, 2, 0, 1, 5, 3)
    return out.copy_(lanes.permute(order))


def weight_of(taps: Tensor, inputs: int) -> Tensor:
    """The weight (32 P, I, 3, 3) whose taps these are, with what pads the outputs."""
    return taps.permute(0, 4, 1, 5, 2, 3).flatten(0, 1).flatten(1, 2)[:, :inputs]


def phases_of(taps: Tensor, inputs: int) -> Tensor:
    """The filters (2, 2, 2, 2, I, 32 P) of :mod:`.upsample2x_filters` that doubled taps are."""
    return taps.permute(1, 2, 4, 5, 3, 7, 0, 6).flatten(6, 7).flatten(4, 5)[..., :inputs, :]


def filters_of(taps: Tensor, inputs: int) -> Tensor:
    """G w G^T rounded to bfloat16, (4, 4, I, 32 P), in float32, or float64 where the taps are."""
    wide = weight_of(taps, inputs).to(torch.promote_types(taps.dtype, torch.float32))
    g = torch.tensor(FILTER, dtype=wide.dtype, device=wide.device)
    return torch.einsum("ak,oikl,bl->abio", g, wide, g).bfloat16().to(wide.dtype)


def cost(weight: Tensor, doubled: bool = False) -> Cost:
    """Each weight read, and nine or, with eleven additions, sixteen values written for nine of them."""
    pairs = weight.shape[0] * weight.shape[1]
    written = 16 if doubled else 9
    return Cost(flops=11 * pairs * doubled, bytes=pairs * (9 * weight.element_size() + 2 * written))


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


def _case(name: str, outputs: int, inputs: int, bench: bool = False, doubled: bool = False) -> Case:
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        return (torch.randn(outputs, inputs, 3, 3, generator=g).to(dtype), doubled)

    return Case(
        f"{name} doubled" if doubled else name, build, dtypes=(torch.float32,) if bench else FLOATS, bench=bench
    )


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    return (draw.tensor((*draw.shape(40, 20), 3, 3), dtype), draw.flag())


OP = register(
    Op(
        name="conv_taps",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance=dict.fromkeys(FLOATS, Tolerance(rms=4e-3, peak=4.2e-3)),
        cases=[_case(*size, doubled=doubled) for doubled in (False, True) for size in SIZES],
        alone=None,
        draw=_draw,
        formula="w, or its four phases for a doubled image, in pairs of inputs and groups of 32 outputs",
        source="Lavin & Gray 2015, arXiv:1509.09308",
    )
)
