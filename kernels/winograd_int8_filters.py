"""The 3x3 filters of an int8 convolution in the domain of Winograd's F(2 x 2, 3 x 3), as int8 codes again.

They depend on the weight alone: a session works them out once, and :mod:`.winograd_conv2d_int8` takes them.  At each of
the 16 points each output has a scale of its own.  ``G w G^T`` of integers is exact, and what fits into eight bits as it
is, at the four corners always, is not rounded again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from fusegen.kernels.conv_taps import GROUP, SIZES
from fusegen.kernels.draw import Draw
from fusegen.kernels.linear_int8 import LARGEST
from fusegen.kernels.op import Case, Cost, Op, Tolerance, register

SCHEMA = "(Tensor weight, Tensor scale) -> (Tensor, Tensor)"
WORD = 4  # input channels that lie together
ZERO = 128  # the code of zero
# G with its inner rows doubled, and what takes that back.
FILTER = ((1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (1.0, -1.0, 1.0), (0.0, 0.0, 1.0))
UNIT = (1.0, 0.5, 0.5, 1.0)


def allocate(weight: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """The uninitialised filters (P, 4, 4, ceil(I / 4), 32, 4) uint8 of weight (O, I, 3, 3) int8 and their scales
    (P, 4, 4, 32) float32 for scale (O,): P groups of 32 output channels, input channels in words of four, zeros (the
    code 128, the scale 0) after the last of either.

    Raises ValueError where they do not fit.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or weight.dtype != torch.int8:
        raise ValueError(
            f"winograd_int8_filters: weight is {weight.dtype} of shape {tuple(weight.shape)}, not int8 (O, I, 3, 3)"
        )
    if tuple(scale.shape) != (weight.shape[0],):
        raise ValueError(f"winograd_int8_filters: scale has shape {tuple(scale.shape)}, not ({weight.shape[0]},)")
    groups, words = -(-weight.shape[0] // GROUP), -(-weight.shape[1] // WORD)
    filters = torch.empty((groups, 4, 4, words, GROUP, WORD), dtype=torch.uint8, device=weight.device)
    return filters, torch.empty((groups, 4, 4, GROUP), dtype=torch.float32, device=weight.device)


def reference(weight: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """``U = 4 G w G^T`` at the inner points, ``2`` or ``1`` times it at the others: integers.  ``top = max(127, |U|)``
    over the inputs; ``codes = round(U (127 / top))`` in float32, ties to even, and 128 is added; their scale is
    ``top / 127 scale / 4``, or ``/ 2`` or ``/ 1``.
    """
    filters, own = allocate(weight, scale)
    g = torch.tensor(FILTER, device=weight.device)
    filled = torch.zeros((own.shape[0] * GROUP, WORD * filters.shape[3], 4, 4), device=weight.device)
    filled[: weight.shape[0], : weight.shape[1]] = torch.einsum("ak,oikl,bl->oiab", g, weight.float(), g)
    top = torch.full_like(own, LARGEST)
    if filled.numel():
        most = filled.abs().amax(1).clamp(min=LARGEST)  # (O, 4, 4)
        filled = (filled * (torch.full_like(most, LARGEST) / most)[:, None]).round()  # 127 / most is another rounding
        top = most.unflatten(0, (-1, GROUP)).permute(0, 2, 3, 1)
    filters.copy_(ZERO + filled.unflatten(1, (-1, WORD)).unflatten(0, (-1, GROUP)).permute(0, 4, 5, 2, 1, 3))
    padded = scale.float().new_zeros(own.shape[0] * GROUP)
    padded[: scale.shape[0]] = scale
    unit = torch.tensor(UNIT, device=weight.device)
    by = (unit[:, None] * unit)[..., None] * padded.unflatten(0, (-1, GROUP))[:, None, None]
    return filters, own.copy_(top * (1 / LARGEST) * by)


def cost(weight: Tensor, scale: Tensor) -> Cost:
    """Nine codes a pair of channels read, 16 written, with 28 additions and 16 products between."""
    pairs = weight.shape[0] * weight.shape[1]
    return Cost(flops=44 * pairs, bytes=25 * pairs + scale.numel() * 17 * 4)


def random_weight(g: Generator, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Codes whose largest magnitude lies in [1, 127], and scales that give outputs the size of the input."""
    weight = torch.randn(outputs, inputs, 3, 3, generator=g)
    most = weight.abs().amax((1, 2, 3), keepdim=True) if weight.numel() else 1.0
    codes = (weight / most * torch.randint(1, LARGEST + 1, (outputs, 1, 1, 1), generator=g)).round()
    size = codes.square().sum((1, 2, 3)).clamp(min=1.0).sqrt()
    return codes.to(torch.int8), (0.5 + torch.rand(outputs, generator=g)) / size


def _case(name: str, outputs: int, inputs: int, bench: bool = False) -> Case:
    def build(g: Generator, dtype: torch.dtype) -> tuple[Any, ...]:
        return random_weight(g, outputs, inputs)

    return Case(name, build, dtypes=(torch.float32,), bench=bench)


def _draw(draw: Draw, dtype: torch.dtype) -> tuple[Any, ...]:
    return random_weight(draw.generator(), *draw.shape(40, 20))


OP = register(
    Op(
        name="winograd_int8_filters",
        schema=SCHEMA,
        reference=reference,
        allocate=allocate,
        cost=cost,
        tolerance={
            torch.uint8: Tolerance(rms=0.0, peak=0.0),  # codes
            torch.float32: Tolerance(rms=2e-7, peak=2e-7),  # three roundings
        },
        cases=[_case(*size) for size in SIZES],
        alone=None,
        draw=_draw,
        formula="round(127 U / max(127, |U|)), U = k G w G^T in integers, for each point and output",
        source="Lavin & Gray 2015, arXiv:1509.09308; Li et al. 2021 (LoWino), ICPP",
    )
)
