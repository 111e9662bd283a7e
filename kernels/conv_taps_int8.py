"""A 3x3 weight of int8 codes as :mod:`.packed_conv2d_int8` reads it: in words of four channels and groups of outputs.

A session lays it so once.  A zero point takes its product with all of an output's weights off each of its sums: what
these add up to is found in the same pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels.conv_taps import GROUP, SIZES
from fusegen.kernels.draw import Draw
from fusegen.kernels.op import Case, Cost, Op, Tolerance, register
from fusegen.kernels.winograd_int8_filters import random_weight

SCHEMA = "(Tensor weight) -> (Tensor, Tensor)"
WORD, CHUNK = 4, 64  # input channels that lie together, and those of a tile


def allocate(weight: Tensor) -> tuple[Tensor, ...]:
    """The uninitialised taps (P, ceil(I / 64), 3, 3, 16, 32, 4) int8 of weight (O, I, 3, 3) int8 and the sums of each
    output's codes (P, 32) int32: P groups of 32 output channels, zeros after the last of outputs or inputs.

    Raises ValueError for another shape or dtype.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or weight.dtype != torch.int8:
        shape = tuple(weight.shape)
        raise ValueError(f"conv_taps_int8: weight is {weight.dtype} of shape {shape}, not int8 (O, I, 3, 3)")
    groups, chunks = -(-weight.shape[0] // GROUP), -(-weight.shape[1] // CHUNK)
    taps = torch.empty((groups, chunks, 3, 3, CHUNK // WORD, GROUP, WORD), dtype=torch.int8, device=weight.device)
    return taps, torch.empty((groups, GROUP), dtype=torch.int32, device=weight.device)


def reference(weight: Tensor) -> tuple[Tensor, ...]:
    """The weight with its axes in another order, and its sums."""
    taps, sums = allocate(weight)
    filled = weight.new_zeros((taps.shape[0] * GROUP, taps.shape[1] * CHUNK, 3, 3))
    filled[: weight.shape[0], : weight.shape[1]] = weight
    sums.copy_(filled.sum((1, 2, 3)).view(sums.shape))
    words = filled.unflatten(1, (-1, CHUNK // WORD, WORD)).unflatten(0, (-1, GROUP))
    return taps.copy_(words.permute(0, 2, 5, 6, 3, 1, 4)), sums


def weight_of(taps: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight (O, I, 3, 3) whose taps these are."""
    return taps.permute(0, 5, 1, 4, 6, 2, 3).flatten(0, 1).flatten(1, 3)[:outputs, :inputs]


def cost(weight: Tensor) -> Cost:
    """Each code read, added up and written once."""
    return Cost(flops=weight.numel(), bytes=2 * weight.numel() + 4 * weight.shape[0])


def _case(name: str, outputs: int, inputs: int, bench: bool = False) -> Case:
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        return random_weight(g, outputs, inputs)[:1]

    return Case(name, build, dtypes=(torch.float32,), bench=bench)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    return random_weight(draw.generator(), *draw.shape(40, 80))[:1]


OP = register(
    Op(
        name="conv_taps_int8",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={
            torch.int8: Tolerance(rms=0.0, peak=0.0),  # codes
            torch.int32: Tolerance(rms=0.0, peak=0.0),  # sums of them
        },
        cases=[_case(*size) for size in (*SIZES, ("several chunks", 40, 131, False))],
        alone=None,
        draw=_draw,
        formula="w, in words of four inputs and groups of 32 outputs, and the sum of each output's",
        source="Jacob et al. 2018, arXiv:1712.05877",
    )
)
